"""The pytest plugin: options, strict expected failures, what a skip means, and messages that help.

Loaded in every pytest run where the package is installed; it looks at conformance checks only.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ollm_conformance import seeds
from ollm_conformance.blame import packages_of, raised_at, what_is_wrong
from ollm_conformance.checks import (
    LEVELS,
    MARK,
    NOT_APPLICABLE,
    UNSUPPORTED,
    Check,
    check_of,
)
from ollm_conformance.results import Outcome, Result, merged, write_json

_RESULTS: pytest.StashKey[list[Result]] = pytest.StashKey()
RESULT = "ollm_result"
"""Of the properties of a report, the one with the fields of a Result."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ollm", "conformance of oLLM adapters")
    group.addoption(
        "--ollm-adapter",
        metavar="NAME",
        help="the installed adapter that ollm_conformance.suite tests",
    )
    group.addoption(
        "--ollm-level",
        choices=LEVELS,
        default="core",
        help="run the checks up to this level (default: core)",
    )
    group.addoption(
        "--ollm-checkpoint",
        metavar="DIR",
        type=Path,
        help="a real model for ollm_conformance.suite, to check its tokenizer",
    )
    group.addoption("--ollm-checks", metavar="ID,ID", help="run only these checks")
    group.addoption(
        "--ollm-seed",
        metavar="N",
        type=int,
        default=0,
        help="draw other random weights, prompts and examples (default: 0)",
    )
    group.addoption(
        "--ollm-results", metavar="FILE", type=Path, help="write the outcome of each check as JSON"
    )


@pytest.hookimpl(tryfirst=True)  # before Hypothesis is given its seed
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}(check): a check of the oLLM conformance suite")
    seed: int = config.getoption("ollm_seed")
    seeds.begin(seed)
    if seed and config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = str(seed)
    config.stash[_RESULTS] = []
    config.pluginmanager.register(_Collector(config.stash[_RESULTS]))


def pytest_unconfigure() -> None:
    seeds.end()


class _Collector:
    """Takes results from reports, which pytest-xdist brings here from its workers."""

    def __init__(self, results: list[Result]) -> None:
        self._results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == RESULT and isinstance(value, dict):
                self._results.append(Result(**value))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop what was not asked for; mark what the adapter says it does not do."""
    levels = LEVELS[: LEVELS.index(config.getoption("ollm_level")) + 1]
    wanted = _wanted(config, items)
    kept, dropped = [], []
    for item in items:
        found = check_of(item)
        if found is None or (found.level in levels and (wanted is None or found.id in wanted)):
            kept.append(item)
            if found:
                _mark(item, found)
        else:
            dropped.append(item)
    _refuse_unknown_failures(items)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say what a failed check means; make a skip that nobody declared a failure."""
    report = yield
    found = check_of(item)
    if found is None:
        return report
    if report.skipped and not _is_xfail(report):
        why = _skip_reason(report)
        if not why.startswith((NOT_APPLICABLE, UNSUPPORTED)):
            report.outcome = "failed"
            report.longrepr = (
                f"the check was skipped ({why}), which counts as a failure: "
                "declare the capability as unsupported, with a reason, or make it pass"
            )
    if report.failed:
        report.sections.insert(0, ("conformance", _explanation(item, found, call)))
    if report.when == "call" or not report.passed:
        report.user_properties.append((RESULT, asdict(_result(item, found, report, call))))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("ollm_results")
    if path is not None and "workerinput" not in vars(session.config):  # xdist sets it in workers
        found: list[Result] = session.config.stash[_RESULTS]
        write_json(merged(found), path)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line for each subject."""
    found: list[Result] = config.stash[_RESULTS]
    results = merged(found)
    if not results:
        return
    terminalreporter.section("oLLM conformance")
    for subject in sorted({result.subject for result in results}):
        counts: dict[Outcome, int] = {}
        for result in results:
            if result.subject == subject:
                counts[result.outcome] = counts.get(result.outcome, 0) + 1
        told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        terminalreporter.line(f"{subject}: {told}")
    terminalreporter.line(f"seed {seeds.run_seed()} (--ollm-seed N draws others)")


def _wanted(config: pytest.Config, items: list[pytest.Item]) -> set[str] | None:
    asked = config.getoption("ollm_checks")
    if asked is None:
        return None
    wanted = {part.strip() for part in asked.split(",")} - {""}
    known = {found.id for found in map(check_of, items) if found}
    if unknown := sorted(wanted - known):
        raise pytest.UsageError(
            f"--ollm-checks: no check {unknown[0]!r} here; there are: {', '.join(sorted(known))}"
        )
    return wanted


def _mark(item: pytest.Item, found: Check) -> None:
    failures = _expected_failures(item)
    if found.id in failures:
        item.add_marker(pytest.mark.xfail(reason=failures[found.id], strict=True))


def _expected_failures(item: pytest.Item) -> dict[str, str]:
    return dict(getattr(getattr(item, "cls", None), "expected_failures", {}))


def _refuse_unknown_failures(items: list[pytest.Item]) -> None:
    """An expected failure of a check that is not there would never be noticed."""
    by_class: dict[type, set[str]] = {}
    for item in items:
        found, cls = check_of(item), getattr(item, "cls", None)
        if found and cls:
            by_class.setdefault(cls, set()).add(found.id)
    for cls, ids in by_class.items():
        for name in getattr(cls, "expected_failures", {}):
            if name not in ids:
                raise pytest.UsageError(
                    f"{cls.__name__}.expected_failures names {name!r}, which is no check; "
                    f"there are: {', '.join(sorted(ids))}"
                )


def _subject_name(item: pytest.Item) -> str:
    name: str = item.cls.subject_name(item.config)  # type: ignore[attr-defined]
    return name


def _explanation(item: pytest.Item, found: Check, call: pytest.CallInfo[None]) -> str:
    error = call.excinfo.value if call.excinfo else None
    place = raised_at(error, _authors(item), item.config.rootpath)
    look = found.look
    if call.when == "setup" and isinstance(error, AssertionError):
        look = "what the line `found` names: no check can say more before that is right"
    return (
        f"{_subject_name(item)} fails check {found.id}\n"
        f"  must hold: {found.reason}\n"
        f"  found:     {what_is_wrong(error)}\n"
        + (f"  raised at: {place}\n" if place else "")
        + f"  look at:   {look}\n"
        f"  again by:  --ollm-checks {found.id} --ollm-seed {seeds.run_seed()}"
    )


def _authors(item: pytest.Item) -> frozenset[str]:
    """Packages of whoever wrote what is tested: the adapter's, or those of the test class of
    another part.
    """
    cls = getattr(item, "cls", object)
    adapter = getattr(cls, "adapter", cls)
    if adapter is None:  # the installed one that an option names
        adapter = getattr(getattr(item, "funcargs", {}).get("subject"), "adapter", cls)
    return packages_of(adapter)


def _result(
    item: pytest.Item, found: Check, report: pytest.TestReport, call: pytest.CallInfo[None]
) -> Result:
    outcome: Outcome = "passed"
    detail = ""
    if report.failed:
        outcome = "failed"
        detail = what_is_wrong(call.excinfo.value) if call.excinfo else str(report.longrepr)
        detail = detail[:300]
    elif _is_xfail(report):
        outcome, detail = "expected failure", str(getattr(report, "wasxfail", ""))
    elif report.skipped:
        why = _skip_reason(report)
        outcome = "unsupported" if why.startswith(UNSUPPORTED) else "does not apply"
        detail = why.removeprefix(UNSUPPORTED).removeprefix(NOT_APPLICABLE)
    return Result(_subject_name(item), found.id, found.reason, found.since, outcome, detail)


def _is_xfail(report: pytest.TestReport) -> bool:
    return "wasxfail" in vars(report)


def _skip_reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)
