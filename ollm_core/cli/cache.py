"""The verb `cache`: prefix caches that earlier runs saved, listed, verified and removed."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ollm_core.cli.options import debug_option, json_option, user_path
from ollm_core.cli.output import print_json, print_table
from ollm_core.errors import InputError, KVStoreError
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.kv.disk.admin import StoredPrefix

Command = TypeVar("Command", bound=Callable[..., Any])

_SHOWN = 12  # digits of an id or fingerprint


def _kv_dir_option(command: Command) -> Command:
    text = "Directory that you gave to `ollm run --kv-dir`."
    return click.option("--kv-dir", metavar="DIR", type=user_path, required=True, help=text)(
        command
    )


@click.group(short_help="List, verify and remove saved prefix caches.")
def cache() -> None:
    """List, verify and remove the prefix caches that earlier runs saved in --kv-dir."""


@cache.command("list")
@_kv_dir_option
@json_option
@debug_option
def list_(kv_dir: Path, as_json: bool) -> None:
    """Show every cached prefix: its model, tokens, size and date."""
    kept, empty = _kept(kv_dir)
    if as_json:
        print_json(
            {"prefixes": [_fields(one) for one in kept], "empty": [str(path) for path in empty]}
        )
        return
    rows = [
        (one.id[:_SHOWN], one.fingerprint[:_SHOWN], one.dtype, str(len(one.prefix.token_ids)),
         format_size(one.num_bytes), _date(one))
        for one in kept
    ]  # fmt: skip
    _print(kv_dir, ("ID", "MODEL", "DTYPE", "TOKENS", "SIZE", "SAVED"), rows)
    if empty:
        click.echo(f"{len(empty)} directories are empty; `ollm cache remove --all` removes them")


@cache.command()
@_kv_dir_option
@json_option
@debug_option
def verify(kv_dir: Path, as_json: bool) -> None:
    """Check every block of the cached prefixes by its checksum. Exits with 1 if one is damaged."""
    from ollm_core.kv.disk.admin import verify as verify_one

    kept, _ = _kept(kv_dir)
    wrong = {id(one): verify_one(one) for one in kept}
    if as_json:
        print_json({"prefixes": [{**_fields(one), "wrong": wrong[id(one)]} for one in kept]})
    else:
        rows = [(one.id[:_SHOWN], wrong[id(one)] or "sound") for one in kept]
        _print(kv_dir, ("ID", "BLOCKS"), rows)
    if any(wrong.values()):
        raise click.exceptions.Exit(1)


@cache.command()
@click.argument("prefix_id", metavar="[ID]", required=False)
@click.option("--all", "everything", is_flag=True, help="Remove every cached prefix.")
@_kv_dir_option
@json_option
@debug_option
def remove(prefix_id: str | None, everything: bool, kv_dir: Path, as_json: bool) -> None:
    """Remove the cached prefix whose id begins with ID, or all of them. Other files stay."""
    from ollm_core.kv.disk.admin import pick, remove_empty
    from ollm_core.kv.disk.admin import remove as remove_kept

    if (prefix_id is None) != everything:
        raise click.UsageError("give either an ID or --all")
    kept, empty = _kept(kv_dir)
    wanted = kept if prefix_id is None else pick(kept, prefix_id)
    in_use = remove_kept(wanted)
    if everything:
        remove_empty(empty)
    removed = [one for one in wanted if one not in in_use]
    if as_json:
        print_json({"removed": [_fields(one) for one in removed], "in_use": len(in_use)})
    else:
        click.echo(f"removed {len(removed)} of {len(kept)} cached prefixes")
    if in_use:
        raise KVStoreError(
            f"{len(in_use)} cached prefixes are in use by another process", hint="try again later"
        )


def _print(kv_dir: Path, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A row for each cached prefix, or that there is none."""
    if rows:
        print_table([heads, *rows])
    else:
        click.echo(f"no cached prefixes in {kv_dir}")


def _kept(kv_dir: Path) -> tuple[list[StoredPrefix], list[Path]]:
    from ollm_core.kv.disk.admin import list_kept

    if not os.path.isdir(kv_dir):
        raise InputError(f"{kv_dir} is not a directory")
    return list_kept(kv_dir)


def _date(one: StoredPrefix) -> str:
    try:
        when = datetime.datetime.fromtimestamp(one.prefix.seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return "?"
    return when.strftime("%Y-%m-%d %H:%M UTC")


def _fields(one: StoredPrefix) -> dict[str, object]:
    """One prefix as JSON shows it."""
    return {
        "id": one.id,
        "model": one.fingerprint,
        "dtype": one.dtype,
        "num_tokens": len(one.prefix.token_ids),
        "num_bytes": one.num_bytes,
        "kept": _date(one),
        "directory": str(one.directory),
    }
