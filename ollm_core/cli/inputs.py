"""Reads the user's text: a file or stdin."""

from __future__ import annotations

import sys
from pathlib import Path

from ollm_core.cli.options import STDIN
from ollm_core.errors import InputError
from ollm_core.memory.sizes import format_size

MAX_BYTES = 100_000_000
"""Of a text: more than any model has positions for. A device never ends."""


def read_text(file: Path) -> str:
    """The UTF-8 text of a file, or of stdin for `-`, without the newlines at its end. Raises
    InputError.
    """
    try:
        if file == Path(STDIN):
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with file.open("rb") as opened:
                data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{file}: more than the {format_size(MAX_BYTES)} that a text may have")
    try:
        return data.decode("utf-8-sig").rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text", hint="convert it to plain text") from error
