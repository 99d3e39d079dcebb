"""Runs pytest in this process, each test a finding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.gpu.parts.work import OutOfTime, Tell, Work


class _Reports:
    """A pytest plugin that tells what fails, and stops when the time is up."""

    def __init__(self, work: Work, tell: Tell) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.out_of_time = False
        self._work = work
        self._tell = tell

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        name = report.nodeid.rpartition("/")[2].lstrip(":")
        seconds = round(report.duration, 2)
        if report.failed:
            error = _last_line(report.longreprtext)
            self._tell(
                name, "failed", fault=error, seconds=seconds, details=report.longreprtext[-4000:]
            )
        else:
            self._tell(name, report.outcome, seconds=seconds)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._work.seconds_left < 2:
            self.out_of_time = True
            item.session.shouldstop = "the time is up"


def run_pytest(work: Work, tell: Tell, arguments: Sequence[str]) -> None:
    """Raises OutOfTime, or RuntimeError if pytest did not run any test."""
    reports = _Reports(work, tell)
    common = ["-q", "-p", "no:cacheprovider", "--tb", "short", "-o", "faulthandler_timeout=0"]
    code = int(pytest.main([*common, *arguments], plugins=[reports]))
    counts = ", ".join(f"{number} {name}" for name, number in reports.counts.items() if number)
    tell("all", counts or "none")
    if reports.out_of_time:
        raise OutOfTime(f"not all tests were run: {counts}")
    if code not in (0, 1) or not sum(reports.counts.values()):
        raise RuntimeError(f"pytest ended with exit code {code}: {counts or 'no test was run'}")


def _last_line(text: str) -> str:
    """The error itself, of a test's report."""
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E")]
    return (lines or text.splitlines() or [""])[0][:300]
