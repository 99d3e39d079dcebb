"""The suite's power: what is broken is caught by the check meant for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_adapters import BROKEN_ADAPTERS
from broken_models import BROKEN_MODELS
from broken_numbers import BROKEN_NUMBERS
from broken_plans import BROKEN_PLANS
from broken_recurrent import BROKEN_RECURRENT
from broken_sizes import BROKEN_SIZES
from power import outcomes
from power_table import power_table

from ollm_conformance.adapter import adapter_checks

BROKEN = [
    *BROKEN_ADAPTERS,
    *BROKEN_MODELS,
    *BROKEN_PLANS,
    *BROKEN_RECURRENT,
    *BROKEN_SIZES,
    *BROKEN_NUMBERS,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_is_caught(broken):
    """The check meant for it fails."""
    assert outcomes(broken.suite, [broken.check]) == {broken.check: "failed"}


def test_every_check_of_an_adapter_catches_something():
    """No check is idle, but those that need a GPU or a real model."""
    idle = {check.id for check in adapter_checks() if check.level == "core"}
    idle -= {broken.check for broken in BROKEN}
    assert idle == {"language.chat-template"}


def test_the_page_is_current():
    """docs/conformance-power.md tells what is run here."""
    page = Path(__file__).parents[2] / "docs/conformance-power.md"
    assert page.read_text() == power_table()
