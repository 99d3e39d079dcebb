"""The suite's power: what is broken is caught by the check meant for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from power import first_failure
from power_table import BROKEN, power_table

from ollm_conformance.adapter import adapter_checks


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_is_caught(broken):
    """The check meant for it fails."""
    assert first_failure(broken.suite, broken.check)


def test_every_check_of_an_adapter_catches_something():
    """No check is idle, but those that need a GPU or a real model."""
    idle = {check.id for check in adapter_checks() if check.level == "core"}
    idle -= {broken.check for broken in BROKEN}
    assert idle == {"language.chat-template"}


def test_the_page_is_current():
    """docs/generated/conformance-power.md tells what is run here."""
    page = Path(__file__).parents[2] / "docs/generated/conformance-power.md"
    assert page.read_text() == power_table()
