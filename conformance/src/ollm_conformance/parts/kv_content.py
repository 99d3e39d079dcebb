"""Checks of what a KV store holds."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits
from ollm_conformance.parts.base import refusal
from ollm_conformance.parts.kv_suite import SMALL, KVStoreSuite
from ollm_conformance.parts.lists import KVShape
from ollm_core import KVStoreError, TiledBlocks


class KVContent(KVStoreSuite):
    """What was appended is what is read, through truncating and forking."""

    @check(
        "kv-store.read-back",
        "What was appended comes back bit for bit, in position order, in blocks [G, n, D].",
        look="append() and blocks()",
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_read_back(self, dtype: torch.dtype) -> None:
        shape = KVShape(dtype=dtype)
        with self.opened(shape) as opened:
            assert opened.store.block_size == shape.block_size, (
                f"expected blocks of {shape.block_size} tokens, got {opened.store.block_size}"
            )
            sequence = opened.store.new_sequence()
            expected = [shape.random(0, 0)] * shape.num_layers
            for seed, length in enumerate([1, 3, 4, 5, 14, 2, 1]):
                new = opened.fill(sequence, length, seed)
                expected = [torch.cat(pair, dim=2) for pair in zip(expected, new, strict=True)]
                opened.expect(sequence, expected, f"after {seed + 1} appends")
            for keys, values in opened.store.blocks(0, sequence):
                for part in (keys, values):
                    heads, length, dim = part.shape
                    expected_form = (shape.num_kv_heads, True, shape.head_dim)
                    assert (heads, 1 <= length <= shape.block_size, dim) == expected_form, (
                        f"expected blocks [{shape.num_kv_heads}, 1 to {shape.block_size}, "
                        f"{shape.head_dim}], got {list(part.shape)}"
                    )

    @check(
        "kv-store.strided",
        "Keys and values are stored right whatever their strides, as layers make them.",
        look="append(): the tensors need not be contiguous",
    )
    def test_strided(self) -> None:
        with self.opened() as opened:
            sequence = opened.store.new_sequence()
            new = SMALL.random(11, 7)
            keys, values = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in new)
            opened.store.append(0, sequence, keys, values)
            keys.zero_()
            values.zero_()
            same_bits(opened.content(0, sequence), new, "after the given tensors were reused")

    @check(
        "kv-store.in-place",
        "The blocks of a store that is in_place are all valid together, and inference mode does "
        "not mark what it keeps.",
        look="blocks(), and what append() allocates",
    )
    def test_in_place(self) -> None:
        with self.opened() as opened:
            store, sequence = opened.store, opened.store.new_sequence()
            with torch.inference_mode(store.in_place):
                expected = opened.fill(sequence, 6)
                for layer_idx in range(SMALL.num_layers if store.in_place else 0):
                    pairs = zip(*list(store.blocks(layer_idx, sequence)), strict=True)
                    found = torch.stack([torch.cat(parts, dim=1) for parts in pairs])
                    same_bits(found, expected[layer_idx], f"all at once, layer {layer_idx}")
            try:
                more = opened.fill(sequence, 9, 1)
            except RuntimeError as error:
                raise AssertionError(
                    f"expected room that can be filled outside of inference mode: {error}"
                ) from error
            whole = [torch.cat(pair, dim=2) for pair in zip(expected, more, strict=True)]
            opened.expect(sequence, whole, "after a pass outside of inference mode")

    @check(
        "kv-store.prefix",
        "Asked for the first tokens only, the store gives those and no more.",
        look="blocks(): num_tokens",
    )
    def test_prefix(self) -> None:
        with self.opened() as opened:
            sequence = opened.store.new_sequence()
            (expected, _) = opened.fill(sequence, 14)
            for length in range(15):
                found = opened.content(0, sequence, length)
                same_bits(found, expected[:, :, :length], f"the first {length} of 14 tokens")

    @check(
        "kv-store.iterators",
        "Reading twice, two readers at once and one that is left half-way do not disturb each "
        "other.",
        look="blocks(): buffers that iterators share",
    )
    def test_iterators(self) -> None:
        with self.opened() as opened:
            sequence = opened.store.new_sequence()
            expected = opened.fill(sequence, 101)
            for time in ("first", "second"):
                opened.expect(sequence, expected, f"the {time} time")
            left = opened.store.blocks(0, sequence)
            next(left)
            del left
            both = zip(
                opened.store.blocks(0, sequence), opened.store.blocks(1, sequence), strict=True
            )
            copies = [(torch.stack(one), torch.stack(other)) for one, other in both]
            for layer_idx in range(2):
                found = torch.cat([pair[layer_idx] for pair in copies], dim=2)
                same_bits(found, expected[layer_idx], f"layer {layer_idx} of two readers")

    @check(
        "kv-store.tiles",
        "Where blocks are given out several at a time, they are those that come one by one.",
        look="tiles() of what blocks() returns",
    )
    def test_tiles(self) -> None:
        with self.opened() as opened:
            store = opened.store
            sequences = [store.new_sequence() for _ in range(2)]
            for seed, length in enumerate([9, 30, 1, 60, 2]):
                for sequence in sequences:
                    opened.fill(sequence, length, seed)
            store.truncate(sequences[0], 50)
            for sequence in reversed(sequences):  # one goes on where the other was
                opened.fill(sequence, 33, 9)
            for first, end in ((0, 83), (0, 80), (3, 83), (4, 81), (5, 6), (41, 79), (7, 7)):
                for sequence in sequences:
                    told = f"positions {first} to {end}"
                    blocks = store.blocks(1, sequence, end, first)
                    if not isinstance(blocks, TiledBlocks):
                        does_not_apply("it gives out blocks one by one")
                    expected = [torch.stack(pair) for pair in store.blocks(1, sequence, end, first)]
                    found = [
                        part
                        for keys, values in blocks.tiles()
                        for part in torch.stack([keys, values], dim=1).unbind()
                    ]
                    lengths = [part.shape[2] for part in found]
                    assert lengths == [part.shape[2] for part in expected], (
                        f"{told}: expected blocks of {[part.shape[2] for part in expected]} "
                        f"tokens, got {lengths}"
                    )
                    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
                        same_bits(one, other, f"{told}, block {number}")

    @check(
        "kv-store.shared",
        "What several sequences are said to have in the same blocks they have: the same keys and "
        "values, one run after the other from the first position on, in whole blocks.",
        look="shared_runs(): where forks part, after truncating and going on too",
    )
    def test_shared(self) -> None:
        with self.opened() as opened:
            store, size = opened.store, opened.store.block_size
            document, other = store.new_sequence(), store.new_sequence()
            opened.fill(document, 30, 0)
            opened.fill(other, 30, 1)
            rows = [document, other, *(store.fork(document, n) for n in (30, 30, 21, 3))]
            for seed, row in enumerate(rows[2:]):
                opened.fill(row, 11 + seed, 2 + seed)
            rows += [store.fork(rows[2]), store.fork(rows[2], 13), store.fork(other)]
            for row, num_tokens in ((rows[2], 18), (rows[3], 14)):  # its forks go on as they were
                store.truncate(row, num_tokens)
                opened.fill(row, 20, num_tokens)
            lengths = [store.num_tokens(row) for row in rows]
            content = {(i, row): opened.content(i, row) for i in range(2) for row in rows}
            for ends in (lengths, [min(n, 25 + i) for i, n in enumerate(lengths)], [7] * len(rows)):
                ends = [min(end, n) for end, n in zip(ends, lengths, strict=True)]
                for layer_idx in range(2):
                    runs = store.shared_runs(layer_idx, rows, ends)
                    reached = [0] * len(rows)
                    for run in runs:
                        told = f"positions {run.first} to {run.end} of rows {run.rows}"
                        told = f"layer {layer_idx}: {told}, asked up to {ends}"
                        assert len(set(run.rows)) == len(run.rows) > 1, f"{told}: expected two rows"
                        assert run.first % size == run.end % size == 0, (
                            f"{told}: expected multiples of {size}"
                        )
                        first = content[layer_idx, rows[run.rows[0]]][:, :, run.first : run.end]
                        for place in run.rows:
                            assert reached[place] == run.first < run.end <= ends[place], (
                                f"{told}: expected row {place} to go on from {reached[place]}"
                            )
                            reached[place] = run.end
                            found = content[layer_idx, rows[place]][:, :, run.first : run.end]
                            same_bits(found, first, f"{told}, of row {place}")
                    for i, run in enumerate(runs):
                        for before in runs[:i]:
                            both = set(run.rows) & set(before.rows)
                            assert not both or set(run.rows) <= set(before.rows), (
                                f"layer {layer_idx}: {run} after {before}: expected rows that are "
                                "all in it, or none"
                            )

    @check(
        "kv-store.num-tokens",
        "Tokens are counted for each layer, and for a sequence as its shortest layer has.",
        look="num_tokens()",
    )
    def test_num_tokens(self) -> None:
        with self.opened() as opened:
            store = opened.store
            sequence = store.new_sequence()
            assert store.num_tokens(sequence) == 0, "expected no tokens in a new sequence"
            for seed, (layer_idx, length) in enumerate([(0, 4), (0, 1), (1, 3), (1, 6)]):
                opened.append(layer_idx, sequence, length, seed)
                found = store.num_tokens(sequence, 0), store.num_tokens(sequence, 1)
                expected = [(4, 0), (5, 0), (5, 3), (5, 9)][seed]
                assert found == expected, f"expected {expected} tokens in layers, got {found}"
                whole = store.num_tokens(sequence)
                assert whole == min(expected), f"expected {min(expected)} in every layer: {whole}"

    @check(
        "kv-store.layers",
        "Sequences and layers that grow in turns, at different lengths, do not mix.",
        look="append(): which blocks belong to which layer of which sequence",
    )
    def test_layers(self) -> None:
        shape = KVShape(num_layers=3)
        with self.opened(shape) as opened:
            sequences = [opened.store.new_sequence() for _ in range(3)]
            expected = {s: [shape.random(0, 0)] * 3 for s in sequences}
            for seed in range(27):
                sequence, layer_idx = sequences[seed % 3], seed // 3 % 3
                new = opened.append(layer_idx, sequence, 1 + seed * 5 % 7, seed)
                layers = expected[sequence]
                layers[layer_idx] = torch.cat([layers[layer_idx], new], dim=2)
            for sequence in sequences:
                opened.expect(sequence, expected[sequence], f"sequence {sequence}")

    @check(
        "kv-store.truncate",
        "Truncating drops what is behind, also into a full block or of layers of different "
        "lengths, and twice is as once.",
        look="truncate()",
    )
    def test_truncate(self) -> None:
        for length in (13, 12, 11, 9, 8, 5, 4, 1, 0):
            with self.opened() as opened:
                sequence = opened.store.new_sequence()
                expected = [layer[:, :, :length] for layer in opened.fill(sequence, 13)]
                opened.append(0, sequence, 6, 77)  # a pass that got no further
                for time in ("once", "twice"):
                    opened.store.truncate(sequence, length)
                    opened.expect(sequence, expected, f"truncated to {length} {time}")

    @check(
        "kv-store.truncate-refused",
        "Truncating to more than is stored is refused, and nothing changes.",
        look="truncate(): raise KVStoreError first",
    )
    def test_truncate_refused(self) -> None:
        with self.opened() as opened:
            sequence = opened.store.new_sequence()
            expected = opened.fill(sequence, 9)
            for length in (10, 12, 100, -1):
                what = f"truncating 9 tokens to {length}"
                refusal(KVStoreError, partial(opened.store.truncate, sequence, length), what)
                opened.expect(sequence, expected, f"after a refused truncate to {length}")

    @check(
        "kv-store.append-after-truncate",
        "After truncate, what is appended stands where the dropped tokens stood.",
        look="truncate(): blocks that were written before, and whatever caches them",
    )
    def test_append_after_truncate(self) -> None:
        for length in (12, 11, 8, 5, 0):
            with self.opened() as opened:
                sequence = opened.store.new_sequence()
                old = opened.fill(sequence, 13)
                opened.expect(sequence, old, "before")
                opened.store.truncate(sequence, length)
                kept = [layer[:, :, :length] for layer in old]
                for seed, more in enumerate((13 - length, 10)):  # first as many as there were
                    new = opened.fill(sequence, more, seed + 1)
                    kept = [torch.cat(pair, dim=2) for pair in zip(kept, new, strict=True)]
                    opened.expect(sequence, kept, f"truncated to {length}, then {more} more")

    @check(
        "kv-store.fork",
        "A fork has the tokens of its origin, and neither sees what the other adds or drops.",
        look="fork(), and what append(), truncate() and release() do with shared blocks",
    )
    def test_fork(self) -> None:
        for length in (13, 12, 10, 8, 3, 0):
            with self.opened() as opened:
                store = opened.store
                origin = store.new_sequence()
                old = opened.fill(origin, 13)
                fork = store.fork(origin, None if length == 13 else length)
                shared = [layer[:, :, :length] for layer in old]
                opened.expect(fork, shared, f"a fork at {length}")
                new = opened.fill(fork, 6, seed=1)
                longer = [torch.cat(pair, dim=2) for pair in zip(shared, new, strict=True)]
                opened.expect(origin, old, f"the origin of a fork at {length} that grew")
                more = opened.fill(origin, 5, seed=2)
                opened.expect(fork, longer, f"a fork at {length} of an origin that grew")
                store.truncate(fork, length // 2)
                old = [torch.cat(pair, dim=2) for pair in zip(old, more, strict=True)]
                opened.expect(origin, old, f"the origin of a fork at {length} that was cut")
                again = opened.fill(fork, 7, seed=3)
                opened.expect(origin, old, f"the origin of a fork at {length}, cut and grown")
                store.release(origin)
                kept = [
                    torch.cat([one[:, :, : length // 2], other], dim=2)
                    for one, other in zip(shared, again, strict=True)
                ]
                opened.expect(fork, kept, f"a fork at {length} of a released origin")
