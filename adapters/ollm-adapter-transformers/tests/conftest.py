"""Which checks of the suite are left to `make soak`: all but a few, of all but some types."""

import pytest

from ollm_conformance.checks import check_of


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        found, cls = check_of(item), getattr(item, "cls", None)
        module = getattr(item, "module", None)
        if found is None or not hasattr(module, "QUICK"):
            continue
        is_whole = cls.tiny_config["model_type"] in module.WHOLE
        if not is_whole and (found.id not in module.QUICK or item.name in module.SPARED):
            item.add_marker(pytest.mark.soak)
