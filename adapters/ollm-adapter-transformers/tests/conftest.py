"""Which checks of the suite are left to `make soak`: all but a few, of all but some types; and
single cases that are known to fail.
"""

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
        is_quick = found.id in module.QUICK and item.name not in module.SPARED
        if model_type in module.SLOW or (model_type not in module.WHOLE and not is_quick):
            item.add_marker(pytest.mark.soak)
        if reason := module.CASES.get(model_type, {}).get(item.name):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
