"""KV stores with one fault each that shows in long texts, behind a window, or in the memory of the
process.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from broken import BrokenPart
from broken_kv_stores import disk_suite_of, suite_of

from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore


class BlockNumbersInAByte(DeviceKVStore):
    def blocks(self, layer_idx, sequence, num_tokens=None, first=0):
        wanted = self.num_tokens(sequence, layer_idx) if num_tokens is None else num_tokens
        begin = first // self.block_size
        found = list(super().blocks(layer_idx, sequence, wanted, begin * self.block_size))
        for number, (keys, values) in enumerate(found, begin):
            skip = first - begin * self.block_size if number == begin else 0
            if number > 255 and number - 256 >= begin:
                other = found[number - 256 - begin]
                keys, values = (part[:, : keys.shape[1]] for part in other)
            yield keys[:, skip:], values[:, skip:]


class LastPositionsOnly(DeviceKVStore):
    def blocks(self, layer_idx, sequence, num_tokens=None, first=0):
        wanted = self.num_tokens(sequence, layer_idx) if num_tokens is None else num_tokens
        return super().blocks(layer_idx, sequence, num_tokens, max(first, wanted - 4096))


class OffsetsOf32Bits(DiskKVStore):
    """Of each file's reads and writes, by the number of bits that are left."""

    num_bits = 32

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for file in self._disk.home.files:
            file._transfer = partial(self.transfer, file._transfer)

    def transfer(self, inner, call, buffer, offset):
        return inner(call, buffer, offset % (1 << self.num_bits))


class OffsetsOf31Bits(OffsetsOf32Bits):
    num_bits = 31


class MirroredInNumpy(DeviceKVStore):
    """Keeps all that it was given once more, and lets it go with the sequence."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.mirror = {}

    def append(self, layer_idx, sequence, keys, values):
        super().append(layer_idx, sequence, keys, values)
        self.mirror.setdefault(sequence, []).append((keys.numpy().copy(), values.numpy().copy()))

    def release(self, sequence):
        super().release(sequence)
        self.mirror.pop(sequence, None)


class ForksCopied(DeviceKVStore):
    """Forks have their tokens once more, for a fast start."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.starts = {}

    def fork(self, sequence, num_tokens=None):
        forked = super().fork(sequence, num_tokens)
        self.starts[forked] = [
            torch.stack(pair)
            for layer_idx in range(self.geometry.num_layers)
            for pair in self.blocks(layer_idx, forked)
        ]
        return forked

    def release(self, sequence):
        super().release(sequence)
        self.starts.pop(sequence, None)


class FreedBlocksKept(DeviceKVStore):
    """Freed blocks go to a list, from which nothing is ever taken."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.freed = []
        free = self._storage.free

        def keep(layer_idx, blocks):
            self.freed += [self._storage._blocks[block] for block in blocks]
            free(layer_idx, blocks)

        self._storage.free = keep


class ReadsKept(DiskKVStore):
    """What was read from disk is kept as bytes, until it changes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.reads = {}

    def blocks(self, layer_idx, sequence, num_tokens=None, first=0):
        pairs = super().blocks(layer_idx, sequence, num_tokens, first)
        for number, (keys, values) in enumerate(pairs):
            self.reads[layer_idx, sequence, number] = torch.stack([keys, values]).numpy().tobytes()
            yield keys, values

    def release(self, sequence):
        super().release(sequence)
        self.reads = {key: one for key, one in self.reads.items() if key[1] != sequence}


class JoinedAtFirst(DeviceKVStore):
    """All blocks of a layer are joined before the first of them is given out."""

    def blocks(self, layer_idx, sequence, num_tokens=None, first=0):
        pairs = list(super().blocks(layer_idx, sequence, num_tokens, first))
        if pairs:
            yield tuple(torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))


class OutlivesItsStore(DeviceKVStore):
    """A closed store's tokens stay in a list of the class."""

    closed: ClassVar = []

    def append(self, layer_idx, sequence, keys, values):
        super().append(layer_idx, sequence, keys, values)
        if keys.shape[1] > 1000:
            self.closed.append(bytearray(torch.stack([keys, values]).numpy().tobytes()))


class SlidesAfterTheChunk(DeviceKVStore):
    """The window is counted from the last token of a chunk."""

    def append(self, layer_idx, sequence, keys, values):
        super().append(layer_idx, sequence, keys, values)
        for table in self._tables_of(sequence)[layer_idx : layer_idx + 1]:
            self._manager.slide(layer_idx, table)


class ForkForgetsTheWindow(DeviceKVStore):
    """A fork of a layer that slides has its last block only."""

    def fork(self, sequence, num_tokens=None):
        forked = super().fork(sequence, num_tokens)
        for layer_idx, table in enumerate(self._tables_of(forked)):
            if self.geometry.kinds[layer_idx].window:
                gone = [table.blocks.pop(index) for index in list(table.blocks)[:-1]]
                self._manager.disown(layer_idx, gone)
        return forked


class PinsNothing(DeviceKVStore):
    """What a pass slides out of is gone before the pass is committed."""

    def reserve(self, sequence, num_tokens, longest=None):
        super().reserve(sequence, num_tokens, longest)
        for table in self._tables_of(sequence):
            table.pinned = 0


class GoneIsZeros(DeviceKVStore):
    """Going back behind what was let go of is allowed, and gives zeros."""

    def _check_length(self, sequence, num_tokens, what):
        for layer_idx, table in enumerate(self._tables_of(sequence)):
            for index in range(self._manager.num_blocks(num_tokens)):
                if index not in table.blocks and num_tokens < table.num_tokens:
                    made = self._storage.allocate({layer_idx: 1}, [])[layer_idx][0]
                    self._storage.open(layer_idx, made).zero_()
                    table.blocks = dict(sorted({**table.blocks, index: made}.items()))
        super()._check_length(sequence, num_tokens, what)


class NeverSlides(DeviceKVStore):
    def __init__(self, geometry, account):
        kinds = tuple(replace(kind, kind="full", window=None) for kind in geometry.kinds)
        super().__init__(replace(geometry, kinds=kinds), account)


class SlidesWhenItIsFull(DeviceKVStore):
    """Lets go of blocks at the first pass alone."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        real = self._manager.slide

        def slide(layer_idx, table):
            if table.num_tokens < 100:
                real(layer_idx, table)

        self._manager.slide = slide


BROKEN_KV_LARGE = [
    BrokenPart(name, fault, suite, f"kv-store.{check}")
    for name, fault, suite, check in [
        ("block-number-in-a-byte", "The number of a block is kept in one byte.",
         suite_of(BlockNumbersInAByte), "long"),
        ("last-positions-only", "The last 4,096 positions are kept.",
         suite_of(LastPositionsOnly), "long"),
        ("offsets-of-32-bits", "Offsets into files have 32 bits.",
         disk_suite_of(OffsetsOf32Bits), "far-blocks"),
        ("offsets-of-31-bits", "Offsets into files have 31 bits.",
         disk_suite_of(OffsetsOf31Bits), "far-blocks"),
        ("mirrored-in-numpy", "Everything is kept once more in numpy.",
         suite_of(MirroredInNumpy), "memory"),
        ("forks-copied", "Each fork has a copy of its tokens that is in no account.",
         suite_of(ForksCopied), "memory"),
        ("freed-blocks-kept", "Freed blocks are kept for ever.",
         suite_of(FreedBlocksKept), "memory"),
        ("reads-kept", "What was read from disk is kept as bytes.",
         disk_suite_of(ReadsKept), "memory"),
        ("joined-at-first", "All blocks of a layer are joined before one is given out.",
         suite_of(JoinedAtFirst), "read-memory"),
        ("outlives-its-store", "Bytes of a closed store are kept by its class.",
         suite_of(OutlivesItsStore), "memory"),
        ("slides-after-the-chunk", "The window is counted from the last token of a chunk.",
         suite_of(SlidesAfterTheChunk), "window"),
        ("fork-forgets-the-window", "A fork of a sliding layer has its last block only.",
         suite_of(ForkForgetsTheWindow), "window"),
        ("pins-nothing", "A pass that is longer than the window cannot be undone.",
         suite_of(PinsNothing), "window-undo"),
        ("gone-is-zeros", "Positions that are gone come back as zeros.",
         suite_of(GoneIsZeros), "window-undo"),
        ("never-slides", "Layers with a window keep everything.",
         suite_of(NeverSlides), "window-bytes"),
        ("slides-at-first", "Layers with a window let go of nothing later on.",
         suite_of(SlidesWhenItIsFull), "window-bytes"),
    ]
]  # fmt: skip
