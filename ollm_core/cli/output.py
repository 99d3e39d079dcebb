"""What the verbs share: options, one JSON object, tables, errors of one line, quiet libraries."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from ollm_core.files.paths import absolute
from ollm_core.memory.budgets import DEFAULTS

Command = TypeVar("Command", bound=Callable[..., Any])

STDIN = "-"
"""What stands for it where a file is named."""


def user_path(value: str) -> Path:
    """The type of options that name a file or directory: `~` is expanded, and the path holds
    wherever the process goes. `-` stays as it is. Raises InputError.
    """
    return Path(value) if value == STDIN else absolute(value)


def json_option(command: Command) -> Command:
    """`--json`, as the argument `as_json`."""
    text = "Print one JSON object on stdout, and nothing else there."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def models_dir_option(command: Command) -> Command:
    """`--models-dir`."""
    text = "Where models lie.  [default: $OLLM_MODELS or ~/.cache/ollm/models]"
    return click.option("--models-dir", metavar="DIR", help=text)(command)


def max_new_tokens_option(command: Command) -> Command:
    """`--max-new-tokens`."""
    return click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)(
        command
    )


def dtype_option(command: Command) -> Command:
    """`--dtype`, to compute in."""
    choices = click.Choice(["auto", "bfloat16", "float16", "float32"])
    return click.option("--dtype", type=choices, default="auto", show_default=True)(command)


def memory_options(command: Command) -> Command:
    """`--device-memory`, `--host-memory`, and how many layers are kept there."""
    text = "The same in host memory, beside a GPU."
    command = click.option("--host-layers", type=click.IntRange(0), help=text)(command)
    text = "Keep at most so many layers on the device.  [default: as the budgets allow]"
    command = click.option("--device-layers", type=click.IntRange(0), help=text)(command)
    text = f"The same of the host's.  [default: {DEFAULTS}]"
    command = click.option("--host-memory", metavar="SIZE", help=text)(command)
    text = "Never hold more of the device's memory, as in 8GB."
    return click.option("--device-memory", metavar="SIZE", help=text)(command)


def chunk_size_option(command: Command) -> Command:
    """`--chunk-size`."""
    text = "Prompt tokens computed at a time."
    return click.option("--chunk-size", type=click.IntRange(1), help=text)(command)


def attention_option(command: Command) -> Command:
    """`--attention`."""
    choices = click.Choice(["auto", "exact", "blockwise", "flash"])
    return click.option("--attention", type=choices, default="auto", show_default=True)(command)


def debug_option(command: Command) -> Command:
    """`--debug`, which any verb and the group take; it shows what `quiet` and `main` hide."""
    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_debug,
        help="Show tracebacks, and what the libraries log.",
    )(command)


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True
        logging.disable(logging.NOTSET)
        warnings.simplefilter("default")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep log lines and warnings of the libraries from the user, for the length of a `with`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def print_json(fields: Mapping[str, object]) -> None:
    """One JSON object on one line."""
    click.echo(json.dumps(fields, ensure_ascii=False))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def print_error(message: str, hint: str = "") -> None:
    """The form of every error: one line on stderr, and one more for what can be done. Where stderr
    takes nothing, as that of a terminal that is gone, nobody can be told.
    """
    with suppress(OSError):
        click.echo(f"error: {' '.join(message.split())}", err=True)
        if hint:
            click.echo(f"hint: {' '.join(hint.split())}", err=True)
