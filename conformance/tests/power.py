"""Runs a suite on a part that is known to be good or bad, and tells what each check said."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from ollm_conformance.results import Outcome, Result, read_json

_MODULE = "ollm_suite_under_test"
_INI = "[pytest]\naddopts =\n"


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
            f"--ollm-results={found}", "-q", "--tb=short", "-p", "no:cacheprovider",
            "-p", "no:faulthandler",
            "-p", "no:unraisableexception",  # it collects garbage for most of the time
            *options,
        ]  # fmt: skip
        if checks:
            arguments.append(f"--ollm-checks={','.join(checks)}")
        sys.modules[_MODULE] = module
        try:
            status = pytest.main(arguments)
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
