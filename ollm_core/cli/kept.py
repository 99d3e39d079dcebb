"""How `ollm cache` shows what prefix caches hold: rows for people, fields for `--json`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.kv.disk.inventory import StoredPrefix, StoredUnfinished
    from ollm_core.kv.recurrent.snapshots import StoredState

SHOWN = 12
"""Digits of an id or a fingerprint."""
PREFIX_HEADS = ("ID", "MODEL", "DTYPE", "TOKENS", "SIZE", "STATES", "LAST USED", "")


def prefix_row(one: StoredPrefix, names: Mapping[str, str]) -> tuple[str, ...]:
    """One prefix for people, below PREFIX_HEADS; `names` are those of models by fingerprint."""
    return (
        one.id[:SHOWN],
        names.get(one.fingerprint, one.fingerprint[:SHOWN]),
        one.dtype,
        str(len(one.prefix.token_ids)),
        format_size(one.num_bytes),
        _states_of(one),
        _date(one.last_used),
        "pinned" if one.pinned else "",
    )


def prefix_fields(one: StoredPrefix) -> dict[str, object]:
    """One prefix as JSON shows it."""
    return {
        "id": one.id,
        "model": one.fingerprint,
        "dtype": one.dtype,
        "num_tokens": len(one.prefix.token_ids),
        "num_bytes": one.num_bytes,
        "kept": _date(one.prefix.seconds),
        "last_used": _date(one.last_used),
        "pinned": one.pinned,
        "num_states": len(one.states),
        "state_bytes": sum(state.num_bytes for state in one.states),
        "directory": str(one.directory),
    }


def state_fields(one: StoredState) -> dict[str, object]:
    """One recurrent state as JSON shows it."""
    return {
        "model": one.fingerprint,
        "dtype": one.dtype,
        "num_tokens": one.num_tokens,
        "num_bytes": one.num_bytes,
        "file": str(one.path),
    }


def unfinished_line(one: StoredUnfinished, names: Mapping[str, str]) -> str:
    """One unfinished prompt for people, with the name of its model."""
    about, model = one.one, names.get(one.fingerprint, one.fingerprint[:SHOWN])
    how_far = f"{about.num_done} of {about.num_layers} layers done"
    return (
        f"unfinished prompt {about.id[:SHOWN]} of model {model}: "
        f"{len(about.prefix.token_ids)} tokens, {how_far}, {format_size(one.num_bytes)}, "
        f"{_date(one.last_used)}"
    )


def unfinished_fields(one: StoredUnfinished) -> dict[str, object]:
    """One unfinished prompt as JSON shows it."""
    about = one.one
    return {
        "id": about.id,
        "model": one.fingerprint,
        "dtype": one.dtype,
        "num_tokens": len(about.prefix.token_ids),
        "num_layers_done": about.num_done,
        "num_layers": about.num_layers,
        "num_bytes": one.num_bytes,
        "written": _date(one.last_used),
        "directory": str(one.directory),
    }


def _states_of(one: StoredPrefix) -> str:
    return format_size(sum(state.num_bytes for state in one.states)) if one.states else "-"


def _date(seconds: int) -> str:
    try:
        when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return "?"
    return when.strftime("%Y-%m-%d %H:%M UTC")
