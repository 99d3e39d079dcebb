"""The smallest memory that a run takes, found by what its refusal says."""

from __future__ import annotations

import pytest

from ollm_core import DoesNotFitError


def least_named(refused):
    """The bytes that a refusal says would do."""
    return int(refused.hint.split("at least ")[1].split(" bytes")[0])


def check_refusal_to_the_byte(run, too_few):
    """`run(num_bytes)` tells the peak of a run in so much device memory. It is refused in `too_few`
    bytes, runs in what the refusal names, and fails one byte below.
    """
    with pytest.raises(DoesNotFitError) as refused:
        run(too_few)
    smallest = least_named(refused.value)
    assert run(smallest) <= smallest
    with pytest.raises(DoesNotFitError, match=r"new tokens.*, limit"):
        run(smallest - 1)


def smallest_budget(run, first=100_000):
    """The least bytes with which `run` passes, as its refusals say, and what it then returns."""
    for _ in range(4):
        try:
            return first, run(first)
        except DoesNotFitError as refused:
            first = least_named(refused)
    raise AssertionError("the refusals do not settle")
