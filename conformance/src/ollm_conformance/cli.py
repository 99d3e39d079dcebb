"""`ollm conformance`: run the suite, list its checks, make the support table."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from ollm_conformance.results import Result, merged, read_json, support_table
from ollm_core import InputError, OllmError, UnknownModelError


class ConformanceError(OllmError):
    """Checks that failed. Exit code 1."""


@click.group(short_help="Prove an adapter by the conformance suite.")
def conformance() -> None:
    """Prove an adapter: same tokens as the un-offloaded model, never a byte over the budget."""


@conformance.command()
@click.argument("adapter")
@click.option("--level", type=click.Choice(["core", "gpu", "speed"]), default="core")
@click.option("--checks", metavar="ID,ID", help="Run only these checks.")
@click.option(
    "--report",
    type=click.Choice(["md", "json", "junit"]),
    help="Write a report to --out, or to stdout.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the report.")
@click.option("--seed", type=int, default=0, help="Draw other random weights and prompts.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A real model of the family, for the checks of its tokenizer.",
)
def run(
    adapter: str,
    level: str,
    checks: str | None,
    report: str | None,
    out: Path | None,
    seed: int,
    checkpoint: Path | None,
) -> None:
    """Run the suite for the installed ADAPTER."""
    _must_be_installed(adapter)
    import pytest  # only here: listing and tables do without

    with tempfile.TemporaryDirectory(prefix="ollm-conformance-") as scratch:
        results, junit = Path(scratch) / "results.json", Path(scratch) / "junit.xml"
        arguments = [
            "--pyargs", "ollm_conformance.suite", "--ollm-adapter", adapter, "--ollm-level", level,
            "--ollm-seed", str(seed), "--ollm-results", str(results), "--junit-xml", str(junit),
            "-p", "no:cacheprovider", "--rootdir", scratch, "-c", "/dev/null",
            "--tb", "short", "-q",
        ]  # fmt: skip
        arguments += ["--ollm-checks", checks] if checks else []
        arguments += ["--ollm-checkpoint", str(checkpoint)] if checkpoint else []
        # The report alone goes to stdout, what pytest tells to stderr.
        with contextlib.redirect_stdout(sys.stderr):
            code = int(pytest.main(arguments))
        found = read_json(results) if results.is_file() else []
        if code not in (0, 1) or not found:
            raise InputError(
                f"the suite could not be run for {adapter} (pytest exit code {code})",
                hint="what pytest says is above",
            )
        if report:
            _write(_rendered(report, found, junit), out)
    if code:
        failed = [result.check for result in found if result.outcome == "failed"]
        raise ConformanceError(
            f"{adapter} fails {len(failed)} of {len(found)} checks: {', '.join(failed)}",
            hint="what each found, and where to look, is above",
        )


@conformance.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_checks(as_json: bool) -> None:
    """List the checks of an adapter: id, first version, and what holds."""
    from ollm_conformance.adapter import adapter_checks

    checks = adapter_checks()
    if as_json:
        fields = ("id", "reason", "look", "since", "level")
        found = [{name: getattr(one, name) for name in fields} for one in checks]
        click.echo(json.dumps({"checks": found}))
        return
    width = max(len(one.id) for one in checks)
    for one in checks:
        click.echo(f"{one.id:{width}}  {one.since}  {one.reason}")


@conformance.command()
@click.argument(
    "results",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--check", type=click.Path(path_type=Path), help="Fail unless FILE holds this table.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File for the table.")
def table(results: Sequence[Path], check: Path | None, out: Path | None) -> None:
    """Make the support table from RESULTS, files that pytest --ollm-results wrote."""
    found = [result for path in results for result in read_json(path)]
    text = _page(found)
    if check is None:
        _write(text, out)
    elif not check.is_file() or check.read_text() != text:
        raise ConformanceError(
            f"{check} is not what the suite found now", hint="`make support` writes it again"
        )


def _must_be_installed(adapter: str) -> None:
    from ollm_core.testing import Registry  # loads torch, as the run will

    registry = Registry.discover()
    if adapter not in registry.adapters:
        failed = "".join(
            f"; {p} failed: {p.reason}" for p in registry.plugins if p.status == "failed"
        )
        raise UnknownModelError(
            f"no adapter {adapter!r} is installed{failed}",
            hint=f"installed: {', '.join(sorted(registry.adapters)) or 'none'}",
        )


def _rendered(report: str, found: Sequence[Result], junit: Path) -> str:
    if report == "junit":
        return junit.read_text()
    if report == "json":
        return (
            json.dumps({"results": [_fields(result) for result in merged(found)]}, indent=1) + "\n"
        )
    return _page(found)


def _fields(result: Result) -> dict[str, str]:
    return {
        "adapter": result.subject, "check": result.check, "outcome": result.outcome,
        "detail": result.detail, "reason": result.reason, "since": result.since,
    }  # fmt: skip


def _page(found: Sequence[Result]) -> str:
    return (
        "# What is supported\n\n"
        "Generated by `ollm conformance` from the outcomes of the suite, never written by hand.\n"
        '"-": the model has no such part. "not yet": a failure that the adapter expects, with its '
        "reason below.\n\n" + support_table(found)
    )


def _write(text: str, out: Path | None) -> None:
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text)
