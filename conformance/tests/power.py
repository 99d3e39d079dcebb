"""Runs suites on parts that are known to be good or bad, and tells what each check said."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import MARK, NOT_APPLICABLE
from ollm_conformance.plugin import RESULT
from ollm_conformance.results import Outcome, Result, read_json

_MODULE = "ollm_suite_under_test"
_INI = "[pytest]\naddopts =\n"
_WITHOUT = (
    "cacheprovider", "doctest", "faulthandler", "junitxml", "logging", "pastebin", "setuponly",
    "setupplan", "stepwise", "timeout", "xdist", "xdist.looponfail",
    "unraisableexception",  # it collects garbage for most of the time
)  # fmt: skip
"""Plugins of pytest that tell nothing here: setting them up takes longer than many a check."""


class _Only:
    """Lets pytest make items of some checks alone, of each test class those of its own: a suite has
    some 150. With `first_alone` none of a class is run after one that failed.
    """

    def __init__(self, checks: Mapping[str, Sequence[str]], *, first_alone: bool = False) -> None:
        """`checks` are ids by the name of a class; none for all."""
        self._checks = checks
        self._first_alone = first_alone
        self.failures: dict[str, Result] = {}
        """By the name of a class, what the first check said that failed."""
        self.unprepared: dict[str, str] = {}
        """Likewise, what went wrong before the first check ran."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(
        self, collector: pytest.Collector, obj: object
    ) -> list[pytest.Item] | None:
        checks = self._checks.get(collector.name)
        marks = getattr(obj, "pytestmark", ()) if checks and not isinstance(obj, type) else ()
        ids = [mark.args[0].id for mark in marks if mark.name == MARK]
        return [] if checks and ids and ids[0] not in checks else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._first_alone and _class_of(item.nodeid) in self.failures:
            pytest.skip(f"{NOT_APPLICABLE}another case has failed")

    def pytest_exception_interact(self, node: pytest.Item, call: pytest.CallInfo[object]) -> None:
        if call.excinfo is None or call.when != "setup":
            return
        if not isinstance(call.excinfo.value, AssertionError):  # which is what the suite says
            self.unprepared.setdefault(_class_of(node.nodeid), call.excinfo.exconly())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for result in (Result(**found) for name, found in report.user_properties if name == RESULT):
            if result.outcome == "failed":
                self.failures.setdefault(_class_of(report.nodeid), result)


def results(suite: type, checks: Sequence[str] = (), options: Sequence[str] = ()) -> list[Result]:
    """Run `checks` (default: all) of a test class through pytest, in this process.

    The class may be one of a module or made on the spot. `options` are more arguments of pytest.
    """
    arguments = [*options, *([f"--ollm-checks={','.join(checks)}"] if checks else [])]
    with tempfile.TemporaryDirectory() as name:
        found = Path(name) / "results.json"
        arguments.append(f"--ollm-results={found}")
        _run({"TestSuite": suite}, arguments, _Only({"TestSuite": checks}))
        return read_json(found)


def outcomes(suite: type, checks: Sequence[str] = ()) -> dict[str, Outcome]:
    """Check id to what became of it, of a run as in `results`."""
    return {result.check: result.outcome for result in results(suite, checks)}


def first_failures(meant: Sequence[tuple[type, str]]) -> list[Result | None]:
    """Of each suite and check, run in this process, what the first case to fail said; None if none
    did. Pytest starts once for all of them, which is most of what a quick check costs. Raises
    AssertionError where a fault could not be made, as of what core has moved.
    """
    suites = {f"Test{number}": suite for number, (suite, _) in enumerate(meant)}
    only = _Only(
        {name: [check] for name, (_, check) in zip(suites, meant, strict=True)}, first_alone=True
    )
    before, AdapterSuite.shrinking_seconds = AdapterSuite.shrinking_seconds, 0
    try:
        _run(suites, ["--tb=no"], only)
    finally:
        AdapterSuite.shrinking_seconds = before
    assert not only.unprepared, "\n".join(only.unprepared.values())  # it was never asked
    return [only.failures.get(name) for name in suites]


def _class_of(nodeid: str) -> str:
    return nodeid.split("::")[1]


def _run(suites: Mapping[str, type], arguments: Sequence[str], only: _Only) -> None:
    """Let pytest run test classes, by the names that they are to have."""
    module = ModuleType(_MODULE)
    vars(module).update(suites)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "pytest.ini").write_text(_INI)
        file = directory / f"test_{directory.name}.py"  # pytest keeps modules by name
        file.write_text("".join(f"from {_MODULE} import {one}\n" for one in suites))
        whole = [
            str(file), f"--rootdir={directory}", "--import-mode=importlib",
            "-c", str(directory / "pytest.ini"), f"--basetemp={directory / 'temp'}",
            "-q", "--tb=short", *(word for one in _WITHOUT for word in ("-p", f"no:{one}")),
            *arguments,
        ]  # fmt: skip
        sys.modules[_MODULE] = module
        try:
            status = pytest.main(whole, plugins=[only])
        finally:
            del sys.modules[_MODULE]
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            told = ", ".join(suite.__name__ for suite in suites.values())
            raise AssertionError(f"{told}: expected a run of pytest, got {status!r}")
