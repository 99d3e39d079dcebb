"""Verifies, removes, prunes and pins what prefix caches in a directory hold, without a model.

Only files that ollm has made are touched, and none that a process owns or reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ollm_core.device.buffers import PAGE, round_up
from ollm_core.errors import InputError, KVStoreError
from ollm_core.files.scratch import take_over
from ollm_core.kv.disk import marks, readers
from ollm_core.kv.disk.borrowed import tokens_of
from ollm_core.kv.disk.compaction import compact
from ollm_core.kv.disk.directory import remove_files
from ollm_core.kv.disk.inventory import (
    Inventory,
    StoredPrefix,
    StoredUnfinished,
    take_inventory,
)
from ollm_core.kv.disk.journal import Journal, LayerBlocks, Prefix, checksum, read_journal
from ollm_core.kv.disk.layer_file import open_own
from ollm_core.kv.disk.unfinished import is_whole, unfinished_files, unfinished_path
from ollm_core.kv.recurrent.snapshots import StoredState, remove_states

_PIECE = 4 << 20
_YOUNG = 24 * 3600
"""Seconds for which a state without a prefix stays: a run may keep that when it ends."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` did."""

    removed: list[StoredPrefix] = field(default_factory=list)
    in_use: list[StoredPrefix] = field(default_factory=list)
    """They would have gone."""
    states: list[StoredState] = field(default_factory=list)
    """Without a prefix, and removed."""
    unfinished: list[StoredUnfinished] = field(default_factory=list)
    """Unfinished prompts that were removed."""
    unfinished_in_use: list[StoredUnfinished] = field(default_factory=list)
    """They would have gone."""


def verify(kept: StoredPrefix) -> str:
    """What is wrong with a prefix, or "" if all its blocks are what was written."""
    wrong = _verify_blocks(kept.directory, kept.prefix, kept.block_bytes)
    return wrong or ("" if kept.prefix.num_blocks else "it has no blocks")


def verify_unfinished(begun: StoredUnfinished) -> str:
    """What is wrong with an unfinished prompt, or "" if all is what was written."""
    try:
        whole = is_whole(begun.directory, begun.one, torch.empty(_PIECE, dtype=torch.uint8))
    except FileNotFoundError:  # it has been finished since it was listed
        return ""
    except (OSError, EOFError, KVStoreError) as error:
        return str(error) or "it has been cut"
    wrong = "" if whole else "its hidden states are not what was written"
    return wrong or _verify_blocks(begun.directory, begun.one.prefix, begun.block_bytes)


def remove(kept: Sequence[StoredPrefix]) -> list[StoredPrefix]:
    """Remove prefixes; a directory that then has none goes too. Returns those that are in use by
    another process and stay. Raises KVStoreError if it fails.
    """
    in_use = []
    for directory in {one.directory for one in kept}:
        mine = [one for one in kept if one.directory == directory]
        keys = {one.prefix.key for one in mine}
        with _owning(directory) as owned:
            if not owned:
                in_use += mine
                continue
            fields, prefixes, _ = read_journal(directory)
            num_layers = len(mine[0].block_bytes)  # others are damaged
            rest = [p for p in prefixes if p.key not in keys and len(p.layers) == num_layers]
            if rest or unfinished_files(directory):
                with Journal(directory, _without_version(fields), create=False) as journal:
                    journal.replace(rest)
                    if not readers.are_there(directory):  # who has just come may be reading
                        with suppress(OSError, KVStoreError):  # a disk that is full, a damaged file
                            compact(directory, journal, rest, mine[0].block_bytes)
                for key in keys:
                    marks.forget(directory, key)
            else:
                remove_files(directory)
    remove_states_of([one for one in kept if one not in in_use])
    return in_use


def remove_unfinished(unfinished: Sequence[StoredUnfinished]) -> list[StoredUnfinished]:
    """Remove unfinished prompts; a directory that then has nothing goes too. Returns those that are
    in use by another process and stay. Raises KVStoreError if it fails.
    """
    in_use = []
    for one in unfinished:
        with _owning(one.directory) as owned:
            if not owned:
                in_use.append(one)
                continue
            unfinished_path(one.directory, one.one.key).unlink(missing_ok=True)
            fields, prefixes, _ = read_journal(one.directory)
            if prefixes:
                with Journal(one.directory, _without_version(fields), create=False) as journal:
                    sizes = one.block_bytes
                    kept = [prefix for prefix in prefixes if len(prefix.layers) == len(sizes)]
                    with suppress(OSError, KVStoreError):  # a disk that is full, a damaged file
                        compact(one.directory, journal, kept, sizes)
            elif not unfinished_files(one.directory):
                remove_files(one.directory)
    return in_use


def remove_empty(directories: Sequence[Path]) -> list[Path]:
    """Remove directories that hold no prefix. Returns those that are in use."""
    in_use = []
    for directory in directories:
        with _owning(directory) as owned:
            if owned:
                remove_files(directory)
            else:
                in_use.append(directory)
    return in_use


def remove_strays(states: Sequence[StoredState], unused_for: float = 0) -> list[StoredState]:
    """Remove states that no prefix leads to: what was written so many seconds ago, and not within a
    day. Returns those that are gone.
    """
    gone = []
    for state in states:
        if time.time() - state.seconds > max(_YOUNG, unused_for):
            with suppress(OSError):
                state.path.unlink()
                gone.append(state)
    return gone


def remove_states_of(gone: Sequence[StoredPrefix]) -> None:
    """Remove the recurrent states of removed prefixes that no other prefix begins with."""
    for parent, fingerprint in {(one.directory.parent, one.fingerprint) for one in gone}:
        kept = take_inventory(parent).prefixes
        left = [one for one in kept if one.fingerprint == fingerprint]
        tokens = [[tokens_of(one.prefix) for one in some] for some in (gone, left)]
        remove_states(parent, fingerprint, *tokens)


def prune(
    inventory: Inventory,
    *,
    models: Collection[str] | None = None,
    unused_for: float | None = None,
    most_bytes: int | None = None,
) -> Pruned:
    """Remove prefixes that are not pinned, least recently used first, and before them unfinished
    prompts: of the models with these fingerprints; those not used for so many seconds; until what
    is left of these models takes `most_bytes`, blocks that are shared counted once. Without either,
    all of them. Raises KVStoreError if it fails.
    """
    now, done = time.time(), Pruned()

    def asked(one: StoredPrefix | StoredState | StoredUnfinished) -> bool:
        return models is None or one.fingerprint in models

    of_model = [one for one in inventory.prefixes if asked(one)]
    strays = [one for one in inventory.states if asked(one)]
    done.states.extend(remove_strays(strays, unused_for or 0))
    begun = [one for one in inventory.unfinished if asked(one)]
    strays = [one for one in strays if one not in done.states]
    left = Inventory(of_model, strays, [], [], begun)
    gone: set[tuple[Path, bytes]] = set()
    for part in begun:
        is_old = unused_for is None or now - part.last_used > unused_for
        is_much = most_bytes is None or left.num_bytes(gone) > most_bytes
        if is_old and is_much:
            if remove_unfinished([part]):
                done.unfinished_in_use.append(part)
            else:
                done.unfinished.append(part)
                gone.add((part.directory, part.one.key))
    for one in of_model:
        is_old = unused_for is None or now - one.last_used > unused_for
        is_much = most_bytes is None or left.num_bytes(gone) > most_bytes
        if one.pinned or not (is_old and is_much):
            continue
        if remove([one]):
            done.in_use.append(one)
        else:
            done.removed.append(one)
            gone.add((one.directory, one.prefix.key))
    return done


def pin(kept: Sequence[StoredPrefix], *, pinned: bool) -> None:
    """Let nothing but `remove` remove prefixes, or no longer. Raises KVStoreError."""
    change: Callable[[Path, bytes], None] = marks.pin if pinned else marks.unpin
    for one in kept:
        try:
            change(one.directory, one.prefix.key)
        except OSError as error:
            raise KVStoreError(f"{one.directory}: {error.strerror}") from error


def pick(kept: Sequence[StoredPrefix], beginning: str) -> list[StoredPrefix]:
    """Those whose id begins so: one id, maybe in several directories. Raises InputError."""
    found = [one for one in kept if beginning and one.id.startswith(beginning.lower())]
    if len({one.id for one in found}) != 1:
        raise InputError(
            f"cached prefixes with an id {beginning!r}...: need 1, have {len(found)}",
            hint="`ollm cache list` shows the ids",
        )
    return found


@contextmanager
def _owning(directory: Path) -> Iterator[bool]:
    """Owns a directory inside the `with`, which gives False if another process does, or reads
    there.
    """
    try:
        lock = take_over(directory)
    except OSError as error:
        raise KVStoreError(f"{directory}: {error.strerror}") from error
    try:
        yield lock is not None and not readers.are_there(directory)
    except OSError as error:
        raise KVStoreError(f"{directory}: {error.strerror}") from error
    finally:
        if lock is not None:
            os.close(lock)


def _verify_blocks(directory: Path, prefix: Prefix, block_bytes: Sequence[int]) -> str:
    for layer_idx, layer in enumerate(prefix.layers):
        path = directory / f"layer-{layer_idx:05}.kv"
        try:
            with ExitStack() as stack:
                file = open_own(path, os.O_RDONLY)
                stack.callback(os.close, file)
                _verify_layer(file, layer, block_bytes[layer_idx], path)
        except (OSError, KVStoreError) as error:
            return str(error)
    return ""


def _verify_layer(file: int, layer: LayerBlocks, block_bytes: int, path: Path) -> None:
    size = os.fstat(file).st_size
    for block, expected in zip(layer.blocks, layer.checksums, strict=True):
        offset = PAGE + block * round_up(block_bytes)
        if offset + block_bytes > size:
            raise KVStoreError(f"{path}: ends before block {block}")
        if checksum(b"".join(_parts(file, offset, block_bytes))) != expected:
            raise KVStoreError(f"{path}: block {block} is not what was written")


def _parts(file: int, offset: int, num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (part := os.pread(file, num_bytes, offset)):
        yield part
        offset, num_bytes = offset + len(part), num_bytes - len(part)


def _without_version(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "version"}
