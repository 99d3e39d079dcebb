"""Good adapters fail no check."""

from __future__ import annotations

import pytest
from families import GptOss, Limited, Qwen3, Qwen3Moe
from power import outcomes

from ollm_conformance import AdapterConformance
from ollm_conformance.adapter import adapter_checks
from ollm_conformance.adapter.asks import ASKS
from ollm_core.registry import CAPABILITIES


@pytest.mark.parametrize("family", [Qwen3, Qwen3Moe, GptOss, Limited])
def test_good_fails_nothing(family):
    """Every check passes, or concerns what the adapter declares not to have."""
    suite = type(f"Test{family.__name__}", (AdapterConformance,), {"adapter": family})
    found = outcomes(suite)
    assert not {name for name, outcome in found.items() if outcome == "failed"}
    unsupported = {name for name, outcome in found.items() if outcome == "unsupported"}
    assert bool(unsupported) is (family is Limited)


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
