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
        model_type, name = cls.tiny_config["model_type"], item.name
        if model_type in module.WHOLE:
            is_spared = name in module.LONG and model_type != module.WHOLE[0]
        else:
            is_spared = found.id not in module.QUICK or name in module.SPARED
        if is_spared:
            item.add_marker(pytest.mark.soak)
