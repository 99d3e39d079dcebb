"""A measurement in a process of its own, under a cap of memory if wanted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks import ROOT

CAPPED = Path(__file__).resolve().parent / "capped.sh"


def script(name: str, python: str = sys.executable) -> list[str]:
    """The command that runs one of our scripts: its name, or its path below benchmarks/."""
    return [python, str(ROOT / "benchmarks"), name]


class ChildError(Exception):
    """No result came; the message is one line that says why."""


def result_of(
    command: Sequence[str],
    *,
    cap: int | None = None,
    seconds: float | None = None,
    environ: Mapping[str, str] | None = None,
    errors: TextIO | None = None,
) -> dict[str, Any]:
    """The JSON object on the last line of `command`'s stdout that begins with a brace.

    - `cap`: MiB of memory that it may use, page cache included (capped.sh; root).
    - `seconds`: after which it is ended, with all that it has started.
    - `errors`: file that takes its stderr, to be read too; by default that is ours.

    Raises ChildError if it ends with another exit code than 0, takes too long or prints none.
    """
    if cap:
        command = [str(CAPPED), str(cap), *command]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=None if environ is None else dict(environ),
        start_new_session=True,
    ) as child:
        try:
            printed, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise ChildError(f"no result after {seconds:.0f} s") from error
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
    if child.returncode:
        raise ChildError(_reason(child.returncode, errors))
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            return result
    raise ChildError("it printed no line of JSON")


def _reason(code: int, errors: TextIO | None) -> str:
    """Why a child ended with `code`, as far as that can be told."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "it was killed, as what needs more memory than the cap is"
    lines: list[str] = []
    if errors is not None:
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    return f"exit code {code}" + (f", {lines[-1]}" if lines else "")
