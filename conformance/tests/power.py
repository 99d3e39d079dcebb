"""Runs a suite on a part that is known to be good or bad, and tells what each check said."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from ollm_conformance.checks import MARK
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
    """Lets pytest make items of some checks alone: a suite has some 150."""

    def __init__(self, checks: Sequence[str]) -> None:
        self._checks = checks

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, obj: object) -> list[pytest.Item] | None:
        marks = getattr(obj, "pytestmark", ()) if self._checks and not isinstance(obj, type) else ()
        ids = [mark.args[0].id for mark in marks if mark.name == MARK]
        return [] if ids and ids[0] not in self._checks else None


def results(suite: type, checks: Sequence[str] = (), options: Sequence[str] = ()) -> list[Result]:
    """Run `checks` (default: all) of a test class through pytest, in this process.

    The class may be one of a module or made on the spot. `options` are more arguments of pytest.
    """
    module = ModuleType(_MODULE)
    module.TestSuite = suite  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "pytest.ini").write_text(_INI)
        file = directory / f"test_{directory.name}.py"  # pytest keeps modules by name
        file.write_text(f"from {_MODULE} import TestSuite\n")
        found = directory / "results.json"
        arguments = [
            str(file), f"--rootdir={directory}", "--import-mode=importlib",
            "-c", str(directory / "pytest.ini"), f"--basetemp={directory / 'temp'}",
            f"--ollm-results={found}", "-q", "--tb=short",
            *(word for name in _WITHOUT for word in ("-p", f"no:{name}")),
            *options,
        ]  # fmt: skip
        if checks:
            arguments.append(f"--ollm-checks={','.join(checks)}")
        sys.modules[_MODULE] = module
        try:
            status = pytest.main(arguments, plugins=[_Only(checks)])
        finally:
            del sys.modules[_MODULE]
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise AssertionError(f"{suite.__name__}: expected a run of pytest, got {status!r}")
        return read_json(found)


def outcomes(suite: type, checks: Sequence[str] = ()) -> dict[str, Outcome]:
    """Check id to what became of it, of a run as in `results`."""
    return {result.check: result.outcome for result in results(suite, checks)}


def first_failure(suite: type, check: str) -> Result | None:
    """What the first case of a check to fail said; None if none did. None is run after it."""
    (result,) = results(suite, [check], ["--exitfirst"])
    return result if result.outcome == "failed" else None
