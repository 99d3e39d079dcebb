"""Lists, verifies and removes the prefix caches in a directory, without a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ollm_core.device.buffers import PAGE, round_up
from ollm_core.errors import InputError, KVStoreError
from ollm_core.files.scratch import take_over
from ollm_core.kv.disk.directory import find_homes, is_home, remove_files
from ollm_core.kv.disk.journal import Journal, LayerBlocks, Prefix, checksum, read_journal
from ollm_core.kv.disk.layer_file import open_own
from ollm_core.kv.recurrent.snapshots import remove_states

_MAX_BLOCK_BYTES = 1 << 30
_MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """One kept prefix and what its directory says of the model."""

    directory: Path
    fingerprint: str
    dtype: str
    block_bytes: tuple[int, ...]
    """Of each layer."""
    prefix: Prefix

    @property
    def id(self) -> str:
        """Hex digits that name the tokens."""
        return self.prefix.key.hex()

    @property
    def num_bytes(self) -> int:
        """On disk. Blocks that several prefixes share are counted in each."""
        sizes = zip(self.prefix.layers, self.block_bytes, strict=True)
        return sum(len(layer.blocks) * round_up(block_bytes) for layer, block_bytes in sizes)


def list_kept(parent: Path) -> tuple[list[StoredPrefix], list[Path]]:
    """The prefixes that are kept in `parent`, oldest first, and directories of ours that hold none:
    a process was killed there, or is at work, or they are damaged.
    """
    found: list[StoredPrefix] = []
    empty = []
    for directory in find_homes(parent):
        here: list[StoredPrefix] = []
        with suppress(OSError, KVStoreError):
            fields, prefixes, _ = read_journal(directory)
            model = str(fields.get("fingerprint")), str(fields.get("dtype")), _block_bytes(fields)
            here = [
                StoredPrefix(directory, *model, prefix)
                for prefix in prefixes
                if len(prefix.layers) == len(model[2])
            ]
        found += here
        if not here and is_home(directory):
            empty.append(directory)
    return sorted(found, key=lambda kept: kept.prefix.seconds), empty


def verify(kept: StoredPrefix) -> str:
    """What is wrong with a prefix, or "" if all its blocks are what was written."""
    total = 0
    for layer_idx, layer in enumerate(kept.prefix.layers):
        path = kept.directory / f"layer-{layer_idx:05}.kv"
        try:
            total += len(layer.blocks)
            with ExitStack() as stack:
                file = open_own(path, os.O_RDONLY)
                stack.callback(os.close, file)
                _verify_layer(file, layer, kept.block_bytes[layer_idx], path)
        except (OSError, KVStoreError) as error:
            return str(error)
    return "" if total else "it has no blocks"


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
            rest = [prefix for prefix in prefixes if prefix.key not in keys]
            if rest:
                with Journal(directory, _without_version(fields), create=False) as journal:
                    journal.replace(rest)
                _shorten(directory, rest, mine[0].block_bytes)
            else:
                remove_files(directory)
    _remove_states([one for one in kept if one not in in_use])
    return in_use


def _remove_states(gone: Sequence[StoredPrefix]) -> None:
    """Remove the recurrent states of removed prefixes that no other prefix begins with."""
    for parent, fingerprint in {(one.directory.parent, one.fingerprint) for one in gone}:
        left = [one for one in list_kept(parent)[0] if one.fingerprint == fingerprint]
        tokens = [
            [torch.frombuffer(one.prefix.token_ids, dtype=torch.int32) for one in some]
            for some in (gone, left)
        ]
        remove_states(parent, fingerprint, *tokens)


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
    """Owns a directory inside the `with`, which gives False if another process does."""
    try:
        lock = take_over(directory)
    except OSError as error:
        raise KVStoreError(f"{directory}: {error.strerror}") from error
    try:
        yield lock is not None
    except OSError as error:
        raise KVStoreError(f"{directory}: {error.strerror}") from error
    finally:
        if lock is not None:
            os.close(lock)


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


def _shorten(directory: Path, prefixes: Sequence[Prefix], block_bytes: Sequence[int]) -> None:
    """Cut the free slots at the end of each layer's file; others are used again by later runs."""
    last: dict[int, int] = {}
    for prefix in prefixes:
        for layer_idx, layer in enumerate(prefix.layers):
            last[layer_idx] = max(last.get(layer_idx, -1), *layer.blocks, -1)
    for layer_idx, block in last.items():
        with suppress(OSError, KVStoreError), ExitStack() as stack:
            file = open_own(directory / f"layer-{layer_idx:05}.kv", os.O_RDWR)
            stack.callback(os.close, file)
            size = PAGE + (block + 1) * round_up(block_bytes[layer_idx])
            if size < os.fstat(file).st_size:
                os.ftruncate(file, size)


def _block_bytes(fields: dict[str, Any]) -> tuple[int, ...]:
    """Of each layer; the header has sizes, and for how many layers each holds."""
    found: list[int] = []
    runs = fields.get("block_bytes")
    for run in runs if isinstance(runs, list) else [()]:
        match run:
            case [int(size), int(count)] if 0 < size <= _MAX_BLOCK_BYTES and count <= _MAX_LAYERS:
                found += [size] * count
            case _:
                raise KVStoreError("the header of the KV file is damaged")
    return tuple(found)


def _without_version(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "version"}
