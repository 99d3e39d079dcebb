"""The suite's power: what is broken is caught by the check meant for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from batches import batches_of, told
from broken_models import LEFT_ENDS
from power import first_failures
from power_table import BROKEN, power_table

from ollm_conformance.adapter import adapter_checks

BATCHES = batches_of(BROKEN)


@pytest.fixture(autouse=True)
def _nothing_stays():
    """Threads that a mutant has left would be taken for those of other tests' models."""
    yield
    LEFT_ENDS.set()
    LEFT_ENDS.clear()


@pytest.mark.parametrize("batch", BATCHES, ids=told)
def test_broken_ones_are_caught(batch):
    """The check meant for each fails."""
    found = first_failures([(broken.suite, broken.check) for broken in batch])
    missed = [broken.name for broken, one in zip(batch, found, strict=True) if one is None]
    assert not missed


def test_every_check_of_an_adapter_catches_something():
    """No check is idle, but those that need a GPU or a real model."""
    idle = {check.id for check in adapter_checks() if check.level == "core"}
    idle -= {broken.check for broken in BROKEN}
    assert idle == {"language.chat-template"}


def test_the_page_is_current():
    """docs/generated/conformance-power.md tells what is run here."""
    page = Path(__file__).parents[2] / "docs/generated/conformance-power.md"
    assert page.read_text() == power_table()
