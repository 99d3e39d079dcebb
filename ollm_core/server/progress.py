"""How far a weight pass is, and when a client that waits may expect its first token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ollm_core.contracts.progress import Progress


@dataclass(frozen=True, slots=True)
class Pass:
    """A weight pass that runs."""

    share: float
    """Of its steps, how many are done."""
    num_new_tokens: int
    seconds: float
    """Since it began."""

    @property
    def seconds_in_all(self) -> float | None:
        """What it will have taken, as far as that can be told."""
        return self.seconds / self.share if self.share > 0.01 else None


class PassWatch:
    """Is called with the progress of each pass, in the thread that runs it, and read from
    others.
    """

    def __init__(self, on_step: Callable[[], None] = lambda: None) -> None:
        """`on_step` is called after each step, in that thread."""
        self._on_step = on_step
        self._number = -1
        self._began = 0.0
        self._last: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        """A step is done."""
        if progress.weight_passes != self._number:
            self._number, self._began = progress.weight_passes, time.monotonic()
        self._last = progress
        self._on_step()

    @property
    def current(self) -> Pass | None:
        """The pass that runs, or None."""
        last = self._last
        if last is None or last.stage == "check" or last.steps_done >= last.steps_total:
            return None
        share = last.steps_done / max(last.steps_total, 1)
        return Pass(share, last.num_new_tokens, time.monotonic() - self._began)


def standing(num_prompt: int, num_read: int | None, current: Pass | None) -> dict[str, Any]:
    """Where a request is before its first token: its state, tokens of its prompt and how many of
    them are read, and the seconds until the first token, if they can be told. `num_read` is None
    while it waits for its first pass.
    """
    told: dict[str, Any] = {
        "state": "waiting" if num_read is None else "reading",
        "prompt_tokens": num_prompt,
        "read_tokens": min(num_read or 0, num_prompt),
    }
    if current is None:
        return told
    told["pass"] = round(current.share, 3)
    if num_read is not None and (whole := current.seconds_in_all) is not None:
        left = max(num_prompt - num_read - current.num_new_tokens, 0)
        more = math.ceil(left / max(current.num_new_tokens, 1))
        told["seconds_left"] = round(whole - current.seconds + more * whole, 1)
    return told
