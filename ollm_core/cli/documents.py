"""Documents for the verbs that ask about some: the flag, and their text put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ollm_core.cli.inputs import as_text_option, read_text
from ollm_core.cli.options import user_path

Command = TypeVar("Command", bound=Callable[..., Any])


def document_options(command: Command) -> Command:
    """`--file`, once for each document, as the argument `files`; and `--as-text`."""
    option = click.option(
        "--file",
        "files",
        metavar="FILE",
        type=user_path,
        multiple=True,
        required=True,
        help="A document: text, Markdown, HTML, PDF or DOCX; - is stdin. Give as many as you have.",
    )
    return option(as_text_option(command))


def read_all(files: Sequence[Path], *, as_text: bool) -> str:
    """Their text in this order; several are told apart by a line with the name before each. Raises
    InputError.
    """
    texts = [read_text(file, as_text=as_text) for file in files]
    if len(texts) == 1:
        return texts[0]
    named = (f"# {file.name}\n\n{text}" for file, text in zip(files, texts, strict=True))
    return "\n\n".join(named)
