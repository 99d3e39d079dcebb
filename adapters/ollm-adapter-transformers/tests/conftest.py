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
        model_type = cls.tiny_config["model_type"]
        is_open = found.id == "memory.plan" and model_type in module.OPEN
        if model_type not in module.WHOLE and (is_open or found.id not in module.QUICK):
            item.add_marker(pytest.mark.soak)
