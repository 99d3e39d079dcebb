"""Makes the files of a home as short as what it keeps: the last blocks move into free slots.

Blocks are copied first, into slots that nothing refers to, then the journal says where they are,
and then the files are cut: whatever moment a process is killed at, the journal is right. Who comes
to read in the meantime keeps the files as they are.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ollm_core.device.buffers import PAGE, round_up
from ollm_core.kv.disk import readers
from ollm_core.kv.disk.journal import Journal, Prefix
from ollm_core.kv.disk.layer_file import open_own
from ollm_core.kv.disk.unfinished import unfinished_files


def compact(
    home: Path, journal: Journal, prefixes: Sequence[Prefix], block_bytes: Sequence[int]
) -> list[Prefix]:
    """Let the files have no free slot. `prefixes` are what `journal` holds, `block_bytes` are of
    each layer. For who owns the home and has seen that nobody reads there. Returns the prefixes as
    they are then. Blocks of an unfinished prompt are not moved: with one, nothing is done. Raises
    OSError or KVStoreError.
    """
    if unfinished_files(home):
        return list(prefixes)
    moved: list[dict[int, int]] = []
    with ExitStack() as stack:
        files = []
        for layer_idx, num_bytes in enumerate(block_bytes):
            file = open_own(home / f"layer-{layer_idx:05}.kv", os.O_RDWR)
            stack.callback(os.close, file)
            files.append(file)
            kept = {slot for prefix in prefixes for slot in prefix.layers[layer_idx].blocks}
            holes = (slot for slot in range(len(kept)) if slot not in kept)
            last = sorted(slot for slot in kept if slot >= len(kept))
            moves = dict(zip(last, holes, strict=True))
            for source, target in moves.items():
                _copy(file, round_up(num_bytes), source, target)
            if moves:
                os.fdatasync(file)
            moved.append({slot: moves.get(slot, slot) for slot in kept})
        compacted = [_at(prefix, moved) for prefix in prefixes]
        journal.replace(compacted)
        if readers.are_there(home):  # who came before that reads where the blocks were
            return compacted
        for file, slots, num_bytes in zip(files, moved, block_bytes, strict=True):
            size = PAGE + len(slots) * round_up(num_bytes)
            if size < os.fstat(file).st_size:
                os.ftruncate(file, size)
    return compacted


def _at(prefix: Prefix, moved: Sequence[dict[int, int]]) -> Prefix:
    layers = tuple(
        replace(layer, blocks=array("I", (slots[slot] for slot in layer.blocks)))
        for layer, slots in zip(prefix.layers, moved, strict=True)
    )
    return replace(prefix, layers=layers)


def _copy(file: int, num_bytes: int, source: int, target: int) -> None:
    """One slot. What is missing of it at the end of a damaged file is missing after it, too."""
    begin, end = PAGE + source * num_bytes, PAGE + target * num_bytes
    while num_bytes and (part := os.pread(file, num_bytes, begin)):
        done = os.pwrite(file, part, end)
        begin, end, num_bytes = begin + done, end + done, num_bytes - done
