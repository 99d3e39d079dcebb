"""Runs command lines in processes of their own, to be killed with -9 at any moment. Each is forked
from this one, which has torch imported and no other thread.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ollm_core.api
import ollm_core.serving.jobs.job  # noqa: F401 # once, for all processes
from ollm_core.cli.main import main


def start(arguments: Sequence[str], out: Path, err: Path | None = None) -> int:
    """-> the process. It writes `out` and `err` anew; without `err`, all at the end of `out`."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if err else os.O_APPEND)
        for number, path in ((1, out), (2, err or out)):
            os.dup2(os.open(path, flags), number)
        main(arguments)
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def ends(child: int, seconds: float, has_begun: Callable[[], bool] = lambda: True) -> bool:
    """Whether it ended by itself, well; else it is killed so long after it `has_begun`."""
    until = None
    while until is None or time.monotonic() < until:
        if until is None and has_begun():
            until = time.monotonic() + seconds
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"exit status {status}"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, f"exit status {status}"
    return not os.WIFSIGNALED(status)
