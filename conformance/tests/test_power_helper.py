"""The helper that the tests of the suite's power rest on."""

from __future__ import annotations

import pytest
from power import outcomes, results

from ollm_conformance.checks import check, does_not_apply


class Toy:
    """A suite of three checks that need no part."""

    @classmethod
    def subject_name(cls, config):
        return "toy"

    @check("toy.good", "It holds.", look="nowhere")
    def test_good(self):
        assert self

    @check("toy.bad", "It does not hold.", look="everywhere")
    def test_bad(self):
        raise AssertionError("expected good, got bad")

    @check("toy.absent", "It is not there.", look="nowhere")
    def test_absent(self):
        does_not_apply("a toy")


def test_outcomes_are_told_by_check():
    """Each check has its outcome, and one that was not asked for has none."""
    assert outcomes(Toy) == {
        "toy.good": "passed", "toy.bad": "failed", "toy.absent": "does not apply",
    }  # fmt: skip
    assert outcomes(Toy, ["toy.bad"]) == {"toy.bad": "failed"}


def test_runs_do_not_mix():
    """A run is one of the class that was given, not of that of the run before."""

    class Other(Toy):
        test_bad = None

    assert outcomes(Toy).keys() - outcomes(Other).keys() == {"toy.bad"}


def test_results_say_why():
    """A result carries the name of the subject and the message of the check."""
    (result,) = results(Toy, ["toy.bad"])
    assert (result.subject, result.detail) == ("toy", "expected good, got bad")


def test_a_run_that_ran_nothing_is_no_outcome():
    """A check that is not there is an error of the test, not a pass."""
    with pytest.raises(AssertionError, match="expected a run of pytest"):
        outcomes(Toy, ["toy.other"])
