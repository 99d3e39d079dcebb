"""What a run of the suite found, as data and as the files that people read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ollm_core import InputError

Outcome = Literal["passed", "failed", "expected failure", "unsupported", "does not apply"]
_WORST: tuple[Outcome, ...] = (
    "failed", "expected failure", "unsupported", "passed", "does not apply",
)  # fmt: skip
_SIGNS: Mapping[Outcome, str] = {
    "passed": "yes", "failed": "**no**", "expected failure": "not yet", "unsupported": "no",
    "does not apply": "-",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one check of one subject. A check of several cases is as good as its worst."""

    subject: str
    """An adapter's name, or that of the part."""
    check: str
    reason: str
    since: str
    outcome: Outcome
    detail: str = ""
    """Why, unless it passed."""


def merged(results: Iterable[Result]) -> list[Result]:
    """One result for each subject and check, sorted by them."""
    worst: dict[tuple[str, str], Result] = {}
    for result in results:
        key = result.subject, result.check
        known = worst.setdefault(key, result)
        if _WORST.index(result.outcome) < _WORST.index(known.outcome):
            worst[key] = result
    return [worst[key] for key in sorted(worst)]


def write_json(results: Iterable[Result], path: Path) -> None:
    """Write results for `read_json`."""
    fields = {"results": [asdict(result) for result in results]}
    path.write_text(json.dumps(fields, indent=1) + "\n")


def read_json(path: Path) -> list[Result]:
    """What `write_json` wrote. Raises InputError for anything else."""
    try:
        found = [Result(**fields) for fields in json.loads(path.read_bytes())["results"]]
        merged(found)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path}: these are no results of the suite: {error}",
            hint="make them with pytest --ollm-results FILE",
        ) from error
    return found


def support_table(results: Sequence[Result]) -> str:
    """A Markdown table: a row for each check, a column for each subject."""
    found = merged(results)
    subjects = sorted({result.subject for result in found})
    by_key = {(result.check, result.subject): result for result in found}
    checks = {result.check: result for result in found}
    lines = [
        "| check | what holds | " + " | ".join(subjects) + " |",
        "| --- | --- |" + " --- |" * len(subjects),
    ]
    notes: list[str] = []
    for name, any_result in sorted(checks.items()):
        cells = []
        for subject in subjects:
            result = by_key.get((name, subject))
            cells.append(_SIGNS[result.outcome] if result else "not run")
            if result and result.detail and result.outcome not in ("passed", "does not apply"):
                notes.append(f"- {subject}, `{name}`: {result.detail}")
        lines.append(f"| `{name}` | {any_result.reason} | " + " | ".join(cells) + " |")
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"
