"""Checks that the disk has room for the KV of a run, before its first token."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ollm_core.contracts.kv import KVGeometry
from ollm_core.errors import DoesNotFitError
from ollm_core.kv.disk.directory import find_homes
from ollm_core.kv.disk.sizes import DiskSizes
from ollm_core.memory.sizes import format_size


def check_room(geometry: KVGeometry, directory: Path, num_tokens: int) -> None:
    """Raise DoesNotFitError if the file system of `directory`, which need not be there yet, has no
    room for the KV of `num_tokens`, over all sequences.

    What is kept there already counts as room: it may be the start of the same prompt. Layers with a
    window are not counted, so what passes may still be refused when space is reserved.
    """
    block_bytes = sum(
        size
        for size, kind in zip(DiskSizes(geometry).slot_bytes, geometry.kinds, strict=True)
        if kind.kind == "full"
    )
    needed = -(-num_tokens // geometry.block_size) * block_bytes
    if needed == 0:
        return
    free = free_bytes(directory)
    if needed > free + sum(map(_size, find_homes(directory))):
        raise DoesNotFitError(
            f"KV cache of {num_tokens} tokens: need {format_size(needed)} in {directory}, "
            f"have {format_size(free)} free",
            hint=f"free {needed - free} bytes, name a directory on another disk with --kv-dir "
            "(kv_dir), or ask for fewer tokens",
        )


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write in `directory`, or where it would be made."""
    there = directory.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize


def _size(home: Path) -> int:
    num_bytes = 0
    with suppress(OSError):
        for path in home.iterdir():
            num_bytes += path.lstat().st_size
    return num_bytes
