"""Standard streams that are closed, full, or whose reader has gone."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import TextIO

import click

from ollm_core.errors import InputError

READER_GONE = 141
"""Exit code where a reader wants no more, as `head` does: as shells give it for SIGPIPE."""


def open_missing() -> None:
    """Let no file of ours become stdin, stdout or stderr: where one is closed, /dev/null takes its
    place. Raises InputError if that is stdout, for the answer would be lost.
    """
    is_open = sys.stdout is not None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # becomes the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 # as long as the process
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if not is_open:
        raise InputError("stdout is closed", hint="send it to /dev/null to do without it")


def flush() -> OSError | None:
    """Write what is left. A stream that takes no more is let go, so that Python does not complain
    of it at exit; returns why stdout did not take all.
    """
    _flush(sys.stderr)
    return _flush(sys.stdout)


def is_gone(error: BaseException) -> bool:
    """Whether the reader of a pipe has closed it."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def was_writing(error: OSError) -> bool:
    """Whether a standard stream, and not a file, refused something."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in (click.echo.__code__, _flush.__code__) for frame, _ in frames)


def _flush(stream: TextIO) -> OSError | None:
    try:
        stream.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        return error
    return None
