"""Checks of a KV store at sizes that long texts have, and of what the process holds for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits
from ollm_conformance.parts.base import fills_memory
from ollm_conformance.parts.kv_machine import OpenStore
from ollm_conformance.parts.kv_suite import KVStoreSuite
from ollm_conformance.parts.lists import KVShape
from ollm_conformance.process_memory import every_time, expect, peak_grown, process_memory
from ollm_core import DoesNotFitError

LONG = KVShape(2, 1, 8, torch.bfloat16, 16)
NUM_POSITIONS = 5000
"""313 blocks of `LONG`."""

FAR = KVShape(1, 1, 32_768, torch.float32, 16)
"""Four MiB to a block, so that few of them are far apart."""
EDGES = (1 << 31, 1 << 32)
"""Bytes at which numbers of 32 bits end, with a sign and without."""

LARGE = KVShape(2, 4, 64, torch.float32, 64)
PIECE = 1024
"""Tokens that are appended at a time: whole blocks."""
NUM_PIECES = 8
"""Of a sequence: 32 MiB."""


class KVSize(KVStoreSuite):
    """Long texts, far offsets, and nothing held that is not told."""

    @check(
        "kv-store.long",
        "Five thousand positions in three hundred blocks come back, from any of them on, cut and "
        "forked behind the first 256 blocks and 4,096 positions.",
        look="numbers of blocks and positions that are kept in one byte or two, or up to a limit",
    )
    def test_long(self) -> None:
        with self.opened(LONG) as opened:
            store, sequence = opened.store, opened.store.new_sequence()
            new = [opened.append(i, sequence, NUM_POSITIONS, i) for i in range(2)]
            opened.expect(sequence, new, f"{NUM_POSITIONS} positions")
            for first, end in ((4095, 4097), (255 * 16, 257 * 16), (4999, 5000), (1, 5000)):
                found = LONG.join(store.blocks(1, sequence, end, first))
                same_bits(found, new[1][:, :, first:end], f"positions {first} to {end}")
            fork = store.fork(sequence, 4500)
            store.truncate(sequence, 4097)
            shorter, more = [t[:, :, :4097] for t in new], opened.fill(sequence, 30, seed=7)
            longer = [torch.cat(pair, dim=2) for pair in zip(shorter, more, strict=True)]
            opened.expect(sequence, longer, "30 more after a cut to 4097")
            opened.expect(fork, [t[:, :, :4500] for t in new], "a fork at 4500")
            store.release(sequence)
            opened.expect(fork, [t[:, :, :4500] for t in new], "a fork that is left alone")

    @check(
        "kv-store.far-blocks",
        "Blocks that lie beyond 2 and 4 GiB of a file, and across these offsets, are other ones "
        "than those at its beginning.",
        look="offsets into files: they need 64 bits, and so does a block's number times its size",
    )
    def test_far_blocks(self) -> None:
        with self.opened(FAR) as opened:
            store, account = opened.store, opened.account
            block_bytes, size = FAR.token_bytes * FAR.block_size, FAR.block_size
            first = store.new_sequence()
            room = 2 * EDGES[1]
            if store.growth_bytes(first, room // FAR.token_bytes).disk < EDGES[1]:
                does_not_apply("it keeps no blocks on disk")
            if fills_memory(opened.directory):
                does_not_apply("temporary files are in memory here")
            account.limit = 1 << 34
            texts = {first: opened.fill(first, 3 * size)}
            end = 3
            for edge in EDGES:
                # Reserved and not written: it takes no time, and what comes next lies behind it.
                gap = store.new_sequence()
                try:
                    store.reserve(gap, (edge // block_bytes - end - 1) * size)
                except DoesNotFitError:
                    does_not_apply(f"the disk has not {edge} bytes for temporary files")
                far = store.new_sequence()
                texts[far] = opened.fill(far, 3 * size, seed=edge)
                end = edge // block_bytes + 2
            for time in ("once", "twice"):
                for sequence, expected in texts.items():
                    opened.expect(sequence, expected, f"sequence {sequence}, {time}")

    @check(
        "kv-store.memory",
        "The process holds what the account has reserved and no more, while sequences and forks "
        "grow, are cut, reset and released in any order, and nothing when all are gone.",
        look="copies of keys and values, of forks or of released blocks that are in no account: "
        "numpy arrays, bytes and maps count too",
    )
    @every_time
    def test_memory(self) -> None:
        pieces = [LARGE.random(PIECE, seed) for seed in range(3)]
        with self.opened(LARGE) as opened:  # what is made once is made here
            Pieces(opened, pieces).add(opened.store.new_sequence(), 1)
        del opened
        with process_memory() as memory:
            with self.opened(LARGE) as opened:
                used = "which the account has reserved"
                held = partial(memory.expect, reserved=used)
                for order in itertools.islice(itertools.permutations(range(3)), 1, 4, 2):
                    text = Pieces(opened, pieces)
                    whole, fork, other = text.grow()
                    held(opened.account.used, "with a sequence and two forks of it")
                    text.reset(other)
                    for place in order:
                        text.release((whole, fork, other)[place])
                        text.check(f"after releasing sequence {place} of the order {order}")
                    held(opened.account.used, f"after releasing all, in the order {order}")
                    assert opened.account.used == opened.empty_bytes, (
                        f"expected {opened.empty_bytes} bytes reserved without sequences, got "
                        f"{opened.account.used}"
                    )
            memory.expect(0, "a closed store", "as before it was opened")

    @check(
        "kv-store.read-memory",
        "Reading a long sequence takes a buffer or two of what it holds, not all of it at once.",
        look="blocks(): read as blocks are asked for; what is read ahead is reserved",
    )
    @every_time
    def test_read_memory(self) -> None:
        pieces = [LARGE.random(PIECE, seed) for seed in range(3)]
        with self.opened(LARGE) as opened:
            text, sequence = Pieces(opened, pieces), opened.store.new_sequence()
            for number in range(NUM_PIECES):
                text.add(sequence, number)

            def read() -> None:
                for pair in opened.store.blocks(0, sequence):
                    del pair

            read()  # what is made once is made here
            used = opened.account.used
            with process_memory():
                peak = peak_grown(read)
                held = max(opened.account.used - used, 0)
                if peak is not None:
                    expect(peak, held, "reading a layer", "which the account has reserved")


class Pieces:
    """Sequences that are made of a few large pieces, compared without a copy."""

    def __init__(self, opened: OpenStore, pieces: Sequence[Tensor]) -> None:
        self._opened = opened
        self._store = opened.store
        self._pieces = pieces
        self._made: dict[int, list[int]] = {}
        """Sequence to the numbers of its pieces."""

    def add(self, sequence: int, number: int) -> None:
        """Append one piece to every layer."""
        self._made.setdefault(sequence, []).append(number)
        for layer_idx in range(self._opened.shape.num_layers):
            keys, values = self._piece(layer_idx, number)
            self._store.append(layer_idx, sequence, keys, values)

    def grow(self) -> tuple[int, int, int]:
        """A sequence, a fork of it that grew, and one that was cut and grew."""
        whole = self._store.new_sequence()
        for number in range(NUM_PIECES):
            self.add(whole, number)
        forks = []
        for length in (NUM_PIECES, NUM_PIECES // 2):
            forks.append(self._store.fork(whole, length * PIECE))
            self._made[forks[-1]] = self._made[whole][:length]
            self.add(forks[-1], length + 1)
        self.check("a sequence and two forks")
        return whole, forks[0], forks[1]

    def reset(self, sequence: int) -> None:
        """Begin it anew."""
        self._store.truncate(sequence, 0)
        self._made[sequence] = []
        for number in (5, 7):
            self.add(sequence, number)

    def release(self, sequence: int) -> None:
        """Forget it."""
        self._store.release(sequence)
        del self._made[sequence]

    def check(self, what: str) -> None:
        """Raises AssertionError unless each sequence holds its pieces, bit for bit."""
        for sequence, numbers in self._made.items():
            for layer_idx in range(self._opened.shape.num_layers):
                told, position = f"{what}: layer {layer_idx} of sequence {sequence}", 0
                for found in self._blocks(layer_idx, sequence):
                    place, inside = divmod(position, PIECE)
                    piece = self._piece(layer_idx, numbers[place])
                    expected = piece[:, :, inside : inside + found.shape[2]]
                    same_bits(found, expected, f"{told}, positions from {position} on")
                    position += found.shape[2]
                assert position == len(numbers) * PIECE, (
                    f"{told}: expected {len(numbers) * PIECE} tokens, got {position}"
                )

    def _blocks(self, layer_idx: int, sequence: int) -> Iterator[Tensor]:
        return map(torch.stack, self._store.blocks(layer_idx, sequence))

    def _piece(self, layer_idx: int, number: int) -> Tensor:
        return self._pieces[(number + layer_idx) % len(self._pieces)]
