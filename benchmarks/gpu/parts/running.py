"""A part as a process of its own: its findings as they come, and how it ended. Free of torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

GRACE_SECONDS = 10.0
"""Between the time that a part is given and its end by force."""
_LAST_LINES = 30
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Ending:
    """How a part has ended."""

    state: str
    """"done"; "cut short": its time was up; "failed"."""
    seconds: float
    error: str = ""
    """One line: why it failed, or what was left out."""
    details: str = ""
    """The traceback, or the last lines of stderr."""


def run_part(
    command: Sequence[str],
    seconds: float,
    take: Callable[[dict[str, Any]], None],
    environ: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> Ending:
    """Run `command` in a process group of its own; `take` is called, on another thread, with each
    line of its stdout that is a JSON object with "finding".

    A line with "error" says how it ended. It is killed with all that it has started some time after
    `seconds`, and when `stop` is set.
    """
    started = time.monotonic()
    stop = stop or threading.Event()
    told: dict[str, Any] = {}

    def read(lines: IO[str]) -> None:
        for line in lines:
            found = _object(line)
            if "finding" in found:
                take(found)
            elif "error" in found:
                told.update(found)

    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=None if environ is None else dict(environ),
            start_new_session=True,
        ) as child,
    ):
        assert child.stdout is not None
        reader = threading.Thread(target=read, args=(child.stdout,), daemon=True)
        reader.start()
        try:
            ends = started + seconds + GRACE_SECONDS
            while child.poll() is None and time.monotonic() < ends:
                if stop.wait(_POLL_SECONDS):
                    break
            killed = child.poll() is None
        finally:
            _end(child)
            reader.join(GRACE_SECONDS)
        errors.seek(0)
        last = "".join(errors.readlines()[-_LAST_LINES:])
    taken = time.monotonic() - started
    if killed:
        return Ending("cut short", taken, f"killed after {taken:.0f} s", last)
    if told:
        state = "cut short" if told.get("out_of_time") else "failed"
        return Ending(state, taken, str(told["error"]), str(told.get("traceback") or last))
    if child.returncode:
        return Ending("failed", taken, _reason(child.returncode, last), last)
    return Ending("done", taken)


def _end(child: subprocess.Popen[str]) -> None:
    """Nothing of the group is left, whatever it is doing."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=3)


def _object(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {}
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _reason(code: int, last: str) -> str:
    why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in last.splitlines() if line.strip()]
    return f"{why}, {lines[-1]}" if lines else why
