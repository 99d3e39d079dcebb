"""Reads the user's text: documents, or stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ollm_core.cli.options import STDIN
from ollm_core.documents.reading import read_document, read_opened
from ollm_core.errors import InputError

Command = TypeVar("Command", bound=Callable[..., Any])


def read_text(file: Path, *, as_text: bool = False) -> str:
    """The text of a document, or of stdin for `-`, without the newlines at its end; what is left
    out of it is told on stderr. Raises InputError.
    """
    if file != Path(STDIN):
        return read_document(file, as_text=as_text, remark=_warn)
    try:
        return read_opened(sys.stdin.buffer, "stdin", as_text=as_text, remark=_warn)
    except OSError as error:
        raise InputError(f"cannot read stdin: {error.strerror}") from error


def as_text_option(command: Command) -> Command:
    """`--as-text`, for verbs that read documents."""
    text = "Read HTML as it is, with its tags.  [default: as its text]"
    return click.option("--as-text", is_flag=True, help=text)(command)


def _warn(line: str) -> None:
    click.echo(f"warning: {line}", err=True)
