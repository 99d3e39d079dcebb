"""How the verbs print: one JSON object, tables, errors of one line, quiet libraries."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import click


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


def format_time(seconds: float) -> str:
    """`4.2 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
