"""The verb `cache`: prefix caches that earlier runs saved, listed, verified, pruned and pinned."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ollm_core.cli.kept import (
    PREFIX_HEADS,
    SHOWN,
    prefix_fields,
    prefix_row,
    state_fields,
    unfinished_fields,
    unfinished_line,
)
from ollm_core.cli.options import debug_option, json_option, user_path
from ollm_core.cli.output import print_json, print_table
from ollm_core.errors import InputError, KVStoreError
from ollm_core.memory.sizes import format_size, parse_size

if TYPE_CHECKING:
    from ollm_core.kv.disk.inventory import Inventory, StoredPrefix, StoredUnfinished

Command = TypeVar("Command", bound=Callable[..., Any])

_AGE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)\s*([mhdw])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _kv_dir_option(command: Command) -> Command:
    text = "Directory that you gave to `ollm run --kv-dir`."
    return click.option("--kv-dir", metavar="DIR", type=user_path, required=True, help=text)(
        command
    )


@click.group(short_help="List, verify, prune and pin saved prefix caches.")
def cache() -> None:
    """List, verify, prune, pin and remove the prefix caches that earlier runs saved in --kv-dir.

    Only files that ollm has made are touched, and none that another process uses.
    """


@cache.command("list")
@_kv_dir_option
@json_option
@debug_option
def list_(kv_dir: Path, as_json: bool) -> None:
    """Show every cached prefix: its model, tokens, size, when it was last used, pins. Prompts that
    were broken off are shown, too, and how far they are.
    """
    inventory = _inventory(kv_dir)
    if as_json:
        print_json(
            {
                "prefixes": [prefix_fields(one) for one in inventory.prefixes],
                "states": [state_fields(one) for one in inventory.states],
                "unfinished": [unfinished_fields(one) for one in inventory.unfinished],
                "empty": [str(path) for path in inventory.empty],
                "remarks": inventory.remarks,
                "num_bytes": inventory.num_bytes(),
            }
        )
        return
    from ollm_core.model.names import known_names

    names = known_names()
    rows = [prefix_row(one, names) for one in inventory.prefixes]
    _print(kv_dir, PREFIX_HEADS, rows)
    for one in inventory.unfinished:
        click.echo(unfinished_line(one, names))
    total = format_size(inventory.num_bytes())
    click.echo(f"total {total}; what prefixes share is counted once", err=True)
    if inventory.states:
        size = format_size(sum(one.num_bytes for one in inventory.states))
        lost = f"{len(inventory.states)} recurrent states ({size}) are of no prefix here"
        click.echo(f"{lost}; `ollm cache prune` removes those of yesterday and before", err=True)
    if inventory.empty:
        empty = f"{len(inventory.empty)} directories hold no prefix"
        click.echo(f"{empty}; `ollm cache remove --all` removes those not in use", err=True)
    _warn(inventory)


@cache.command()
@click.option("--remove", "removing", is_flag=True, help="Remove what is damaged.")
@_kv_dir_option
@json_option
@debug_option
def verify(removing: bool, kv_dir: Path, as_json: bool) -> None:
    """Check all cached prefixes, states and unfinished prompts by their checksums. Exits with 1 if
    one is damaged, and is not removed.
    """
    from ollm_core.kv.disk.admin import remove as remove_kept
    from ollm_core.kv.disk.admin import remove_unfinished, verify_unfinished
    from ollm_core.kv.disk.admin import verify as verify_one
    from ollm_core.kv.recurrent.snapshots import verify_state

    inventory = _inventory(kv_dir)
    wrong = {id(one): verify_one(one) for one in inventory.prefixes}
    states = {state.path: state for one in inventory.prefixes for state in one.states}
    states |= {state.path: state for state in inventory.states}
    damaged_states = {state: found for state in states.values() if (found := verify_state(state))}
    damaged = [one for one in inventory.prefixes if wrong[id(one)]]
    broken = {id(one): verify_unfinished(one) for one in inventory.unfinished}
    damaged_passes = [one for one in inventory.unfinished if broken[id(one)]]
    left = [*map(id, damaged), *damaged_states, *map(id, damaged_passes)]
    num_damaged = len(left)
    if removing:
        in_use = remove_kept(damaged)
        left = [*map(id, in_use), *(state for state in damaged_states if not _unlink(state.path))]
        left += map(id, remove_unfinished(damaged_passes))
    if as_json:
        print_json(
            {
                "prefixes": [
                    {**prefix_fields(one), "wrong": wrong[id(one)]} for one in inventory.prefixes
                ],
                "states": [
                    {**state_fields(one), "wrong": damaged_states.get(one, "")}
                    for one in states.values()
                ],
                "unfinished": [
                    {**unfinished_fields(one), "wrong": broken[id(one)]}
                    for one in inventory.unfinished
                ],
                "remarks": inventory.remarks,
                "num_left": len(left),
            }
        )
    else:
        rows = [(one.id[:SHOWN], wrong[id(one)] or "sound") for one in inventory.prefixes]
        rows += [
            (f"state {one.num_tokens}", damaged_states.get(one, "") or "sound")
            for one in states.values()
        ]
        rows += [(one.one.id[:SHOWN], broken[id(one)] or "sound") for one in inventory.unfinished]
        _print(kv_dir, ("ID", "BLOCKS"), rows)
        if removing:
            click.echo(f"removed {num_damaged - len(left)} of {num_damaged} damaged ones")
        _warn(inventory)
    if left:
        raise click.exceptions.Exit(1)


@cache.command()
@click.argument("prefix_id", metavar="[ID]", required=False)
@click.option("--all", "everything", is_flag=True, help="Remove every cached prefix.")
@_kv_dir_option
@json_option
@debug_option
def remove(prefix_id: str | None, everything: bool, kv_dir: Path, as_json: bool) -> None:
    """Remove the cached prefix or unfinished prompt whose id begins with ID, or all of them, pinned
    or not. Other files stay.
    """
    from ollm_core.kv.disk.admin import pick, remove_empty, remove_unfinished
    from ollm_core.kv.disk.admin import remove as remove_kept

    if (prefix_id is None) != everything:
        raise click.UsageError("give either an ID or --all")
    inventory = _inventory(kv_dir)
    kept = inventory.prefixes
    begun = inventory.unfinished
    wanted_begun = [one for one in begun if prefix_id is None or _is_named(one, prefix_id)]
    wanted = kept
    if prefix_id is not None:
        wanted = [] if wanted_begun else pick(kept, prefix_id)
    in_use = remove_kept(wanted)
    busy = remove_unfinished(wanted_begun)
    if everything:
        remove_empty(inventory.empty)
        for state in inventory.states if not in_use else ():
            _unlink(state.path)
    removed = [one for one in wanted if one not in in_use]
    gone = [one for one in wanted_begun if one not in busy]
    if as_json:
        print_json(
            {
                "removed": [prefix_fields(one) for one in removed],
                "removed_unfinished": [unfinished_fields(one) for one in gone],
                "in_use": len(in_use) + len(busy),
            }
        )
    else:
        click.echo(f"removed {_counted(len(removed), len(kept), len(gone), len(begun))}")
    _check_in_use(in_use, busy)


@cache.command()
@click.option("--older-than", metavar="AGE", help="Those not used for so long, as 30d, 12h or 4w.")
@click.option("--to", "most", metavar="SIZE", help="Least recently used first, down to this size.")
@click.option(
    "--model",
    metavar="MODEL",
    help="Those of one model, by its name or the start of its fingerprint.",
)
@_kv_dir_option
@json_option
@debug_option
def prune(
    older_than: str | None, most: str | None, model: str | None, kv_dir: Path, as_json: bool
) -> None:
    """Remove cached prefixes and unfinished prompts by age, by size, or those of one model. Pinned
    prefixes stay.

    With both --older-than and --to, the old ones go until the rest is small enough.
    """
    from ollm_core.kv.disk.admin import prune as prune_kept

    if older_than is None and most is None and model is None:
        raise click.UsageError("give --older-than, --to or --model")
    inventory = _inventory(kv_dir)
    done = prune_kept(
        inventory,
        models=None if model is None else _models_of(inventory, model),
        unused_for=None if older_than is None else _seconds(older_than),
        most_bytes=None if most is None else parse_size(most),
    )
    left = _inventory(kv_dir)
    if as_json:
        print_json(
            {
                "removed": [prefix_fields(one) for one in done.removed],
                "removed_states": [state_fields(one) for one in done.states],
                "removed_unfinished": [unfinished_fields(one) for one in done.unfinished],
                "in_use": len(done.in_use) + len(done.unfinished_in_use),
                "remarks": inventory.remarks,
                "num_bytes": left.num_bytes(),
            }
        )
    else:
        prefixes = len(done.removed), len(inventory.prefixes)
        counted = _counted(*prefixes, len(done.unfinished), len(inventory.unfinished))
        click.echo(f"removed {counted}; {format_size(left.num_bytes())} left")
        _warn(inventory)
    _check_in_use(done.in_use, done.unfinished_in_use)


@cache.command()
@click.argument("prefix_id", metavar="ID")
@_kv_dir_option
@json_option
@debug_option
def pin(prefix_id: str, kv_dir: Path, as_json: bool) -> None:
    """Keep the prefix whose id begins with ID: prune and --kv-budget then leave it."""
    _pin(prefix_id, kv_dir, as_json, pinned=True)


@cache.command()
@click.argument("prefix_id", metavar="ID")
@_kv_dir_option
@json_option
@debug_option
def unpin(prefix_id: str, kv_dir: Path, as_json: bool) -> None:
    """Let the prefix whose id begins with ID go like any other."""
    _pin(prefix_id, kv_dir, as_json, pinned=False)


def _pin(prefix_id: str, kv_dir: Path, as_json: bool, *, pinned: bool) -> None:
    from ollm_core.kv.disk.admin import pick
    from ollm_core.kv.disk.admin import pin as pin_kept

    wanted = pick(_inventory(kv_dir).prefixes, prefix_id)
    pin_kept(wanted, pinned=pinned)
    changed = pick(_inventory(kv_dir).prefixes, wanted[0].id)
    if as_json:
        print_json({"prefixes": [prefix_fields(one) for one in changed]})
    else:
        click.echo(f"{'pinned' if pinned else 'unpinned'} {wanted[0].id[:SHOWN]}")


def _inventory(kv_dir: Path) -> Inventory:
    from ollm_core.kv.disk.inventory import take_inventory

    if not os.path.isdir(kv_dir):
        raise InputError(f"{kv_dir} is not a directory")
    return take_inventory(kv_dir)


def _models_of(inventory: Inventory, model: str) -> list[str]:
    """The fingerprints that a name stands for, or the one, if any, that begins so. Raises
    InputError."""
    from ollm_core.model.names import known_names

    known = {one.fingerprint for one in inventory.prefixes}
    known |= {one.fingerprint for one in inventory.states}
    known |= {one.fingerprint for one in inventory.unfinished}
    fingerprints, names = sorted(known), known_names()
    if named := [one for one in fingerprints if names.get(one) == model]:
        return named
    begun = [one for one in fingerprints if model and one.startswith(model)]
    if len(begun) > 1:
        raise InputError(
            f"--model {model}: need the name of a model or the start of 1 fingerprint, "
            f"have that of {len(begun)}"
        )
    return begun


def _warn(inventory: Inventory) -> None:
    for remark in inventory.remarks:
        click.echo(f"warning: {remark}", err=True)


def _check_in_use(
    in_use: Sequence[StoredPrefix], unfinished: Sequence[StoredUnfinished] = ()
) -> None:
    busy = [f"{len(in_use)} cached prefixes"] if in_use else []
    busy += [f"{len(unfinished)} unfinished prompts"] if unfinished else []
    if busy:
        raise KVStoreError(
            f"{' and '.join(busy)} are in use by another process", hint="try again later"
        )


def _print(kv_dir: Path, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A row for each cached prefix, or that there is none."""
    if rows:
        print_table([heads, *rows])
    else:
        click.echo(f"no cached prefixes in {kv_dir}")


def _unlink(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _seconds(age: str) -> float:
    found = _AGE.fullmatch(age.strip())
    if not found:
        raise InputError(f"--older-than {age!r} is not an age", hint="write it as 30d, 12h or 4w")
    return float(found[1]) * _SECONDS[found[2]]


def _counted(prefixes: int, of: int, unfinished: int, of_unfinished: int) -> str:
    """How many of what is there, for people."""
    told = f"{prefixes} of {of} cached prefixes"
    if of_unfinished:
        told += f", {unfinished} of {of_unfinished} unfinished prompts"
    return told


def _is_named(one: StoredUnfinished, beginning: str) -> bool:
    return bool(beginning) and one.one.id.startswith(beginning.lower())
