"""Each fault of a part is found by the check that is meant to find it, and good parts pass."""

from __future__ import annotations

import pytest
from batches import batches_of, told
from broken_parts import BROKEN_PARTS, GOOD_PARTS
from power import first_failures, outcomes

from ollm_conformance.checks import MARK

BATCHES = batches_of(BROKEN_PARTS)


def checks_of(suite):
    """The ids of a suite's checks."""
    tests = [getattr(suite, name) for name in dir(suite) if name.startswith("test_")]
    marks = [mark for test in tests for mark in vars(test).get("pytestmark", ())]
    return {mark.args[0].id for mark in marks if mark.name == MARK}


@pytest.mark.parametrize("batch", BATCHES, ids=told)
def test_each_fault_is_found(batch):
    """The meant check, run alone, fails on what it expected and did not get."""
    found = first_failures([(part.suite, part.check) for part in batch])
    for part, result in zip(batch, found, strict=True):
        assert result, f"{part.name}: {part.fault}"
        assert "expected" in result.detail, f"{part.name}: {result.detail}"


@pytest.mark.parametrize("suite", GOOD_PARTS, ids=lambda suite: suite.__mro__[1].__name__)
def test_good_parts_pass(suite):
    """No check fails on a part without a fault."""
    found = outcomes(suite)
    assert found.keys() == checks_of(suite)
    assert set(found.values()) <= {"passed", "does not apply"}


def test_every_check_finds_something():
    """There is a fault for each check of a part, so that none of them is idle."""
    idle = set().union(*map(checks_of, GOOD_PARTS)) - {part.check for part in BROKEN_PARTS}
    assert not idle, idle
