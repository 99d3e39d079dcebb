"""Good adapters fail no check."""

from __future__ import annotations

import pytest
from broken_adapters import BROKEN_ADAPTERS
from broken_declarations import BROKEN_DECLARATIONS
from broken_models import BROKEN_MODELS
from families import Gemma2, GptOss, Granite, Limited, Qwen3, Qwen3Moe
from power import outcomes

from ollm_conformance import AdapterConformance
from ollm_conformance.adapter import adapter_checks
from ollm_conformance.adapter.asks import ASKS
from ollm_core.registry import CAPABILITIES


def suite_of(family):
    """A test class for it."""
    return type(f"Test{family.__name__}", (AdapterConformance,), {"adapter": family})


@pytest.mark.parametrize("family", [Qwen3, Limited])
def test_good_fails_nothing(family):
    """Every check passes, or concerns what the adapter declares not to have."""
    found = outcomes(suite_of(family))
    assert not {name for name, outcome in found.items() if outcome == "failed"}
    unsupported = {name for name, outcome in found.items() if outcome == "unsupported"}
    assert bool(unsupported) is (family is Limited)


@pytest.mark.parametrize("family", [Qwen3Moe, GptOss, Granite])
def test_good_passes_what_its_broken_ones_fail(family):
    """So what fails there is the fault. All checks are run by the tests of adapters."""
    checks = {
        broken.check
        for broken in [*BROKEN_ADAPTERS, *BROKEN_DECLARATIONS, *BROKEN_MODELS]
        if issubclass(broken.suite.adapter, family)
    }
    found = outcomes(suite_of(family), sorted(checks))
    assert found == dict.fromkeys(checks, "passed")


SCALED = {
    Gemma2: {"declaration.unsupported", "exact.window-edges", "memory.freed", "weights.tied-head"},
    Granite: {"exact.blockwise", "exact.chunks"},
}
"""Checks of families that scale and cap."""


@pytest.mark.parametrize("family", SCALED)
def test_good_scales_and_caps(family):
    """What is computed outside the layers is done and let go; texts have an end to stop at."""
    ends = {"drafts.stop", "language.stop-rows"}
    common = {"configs.unstated", "declaration.outside-layers", "exact.decode", "weights.flags"}
    found = outcomes(suite_of(family), sorted(SCALED[family] | common | ends))
    assert not {name: outcome for name, outcome in found.items() if outcome == "failed"}


def test_ids_are_distinct_and_say_what_holds():
    """No two checks share an id, and each has a sentence and a place to look."""
    checks = adapter_checks()
    assert len({check.id for check in checks}) == len(checks) > 45
    for check in checks:
        assert check.reason.endswith("."), check.id
        assert len(check.look) > 10, check.id


def test_every_capability_can_be_asked_for():
    """Whatever an adapter may declare unsupported, the suite tries."""
    assert ASKS.keys() == CAPABILITIES.keys()
