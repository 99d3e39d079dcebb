"""Runs walks: draws the steps, takes them, and when one goes wrong tells the fewest that do."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Mapping, Sequence

from ollm_conformance.seeds import run_seed
from ollm_conformance.subject import Subject
from ollm_conformance.walk.sequence_steps import SequenceSteps

Step = tuple[str, int]
"""What is done, and the seed of how."""

ROWS: Mapping[str, int] = {
    "say": 6, "write": 4, "select": 3, "crop": 4, "leave": 2, "broken_off": 3, "draft": 4,
    "refuse": 1, "reset": 1, "hold": 1, "lose": 1, "reopen": 1,
}  # fmt: skip
"""Steps on rows of batches, and how often."""
SEQUENCES: Mapping[str, int] = {"run": 5, "part": 4, "back": 2, "drop": 1, "hold": 1}
"""Steps on sequences."""


def walk(
    subject: Subject, steps: Mapping[str, int], num_steps: int, shrinking_seconds: float
) -> None:
    """Take `num_steps` random steps on a new model, each kind at least once. Raises AssertionError
    with the fewest steps that were found to go wrong, looked for so long.
    """
    draw = random.Random(run_seed())
    names = [*steps, *draw.choices(list(steps), list(steps.values()), k=num_steps - len(steps))]
    draw.shuffle(names)
    drawn = [(name, draw.randrange(1 << 30)) for name in names]
    failed = _take(subject, drawn)
    if failed is None:
        return
    told, error = _shrink(
        subject, drawn[: len(failed[0])], failed, time.monotonic() + shrinking_seconds
    )
    steps_told = "; ".join(f"{place + 1}. {one}" for place, one in enumerate(told))
    raise AssertionError(
        f"seed {run_seed()}: {_one_line(error)} - after these steps: {steps_told}"
    ) from error


_Failed = tuple[list[str], BaseException]


def _take(subject: Subject, steps: Sequence[Step]) -> _Failed | None:
    """Take the steps. What each did, up to the one that went wrong, and how; None if none did."""
    told: list[str] = []
    world: SequenceSteps | None = None
    try:
        world = SequenceSteps(subject)
        for name, seed in steps:
            world.told = ""
            told.append(name)
            try:
                getattr(world, name)(random.Random(seed))
                world.check()
            finally:
                told[-1] = world.told
        told.append("close the model")
        world.end()
    except Exception as error:  # noqa: BLE001 - whatever the model raises is wrong here
        return told, error
    finally:
        if world is not None:
            world.model.close()
    return None


def _shrink(subject: Subject, steps: list[Step], failed: _Failed, until: float) -> _Failed:
    """Leave out steps as long as the walk still fails, until then."""
    size = max(len(steps) // 2, 1)
    while size:
        place = 0
        while place < len(steps) and time.monotonic() < until:
            fewer = steps[:place] + steps[place + size :]
            found = _take(subject, fewer)
            if found is None:
                place += size
            else:
                steps, failed = fewer[: len(found[0])], found
        size //= 2
    told = [one for one in failed[0] if one]
    return told, failed[1]


def _one_line(error: BaseException) -> str:
    """What went wrong, with where if it is no assertion."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AssertionError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({last.name}, line {last.lineno})"
