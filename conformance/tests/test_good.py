"""Good adapters fail no check."""

from __future__ import annotations

import pytest
from families import (
    Gemma2,
    GptOss,
    Granite,
    GraniteOne,
    GraniteSmall,
    Limited,
    Qwen3,
    Qwen3Moe,
)
from power import outcomes
from power_table import BROKEN

from ollm_conformance import AdapterConformance
from ollm_conformance.adapter import adapter_checks
from ollm_conformance.adapter.asks import ASKS
from ollm_core import CAPABILITIES


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
    adapters = (one for one in BROKEN if issubclass(one.suite, AdapterConformance))
    checks = {broken.check for broken in adapters if issubclass(broken.suite.adapter, family)}
    if family is Qwen3Moe:  # it has more than ten experts, its broken one has eight
        checks.discard("experts.many")
    found = outcomes(suite_of(family), sorted(checks))
    assert found == dict.fromkeys(checks, "passed")


@pytest.mark.parametrize("family", [GraniteOne, GraniteSmall])
def test_good_may_make_much_or_little_of_rounding(family):
    """Scores may be large or small: the errors of block-wise attention are bounded by the model."""
    assert outcomes(suite_of(family), ["exact.blockwise"]) == {"exact.blockwise": "passed"}


def test_soft_caps_ties_and_windows_are_good():
    """Gemma 2, whose head would say the last token again, and which multiplies by a tensor, passes
    what such a family may wrongly fail; block-wise attention it declares not to have.
    """
    checks = (
        "configs.unstated", "declaration.outside-layers", "declaration.unsupported", "drafts.stop",
        "exact.decode", "language.stop-list", "memory.freed", "weights.tied-head",
    )  # fmt: skip
    found = outcomes(suite_of(Gemma2), [*checks, "exact.blockwise"])
    assert found == {**dict.fromkeys(checks, "passed"), "exact.blockwise": "unsupported"}


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
