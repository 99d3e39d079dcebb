"""The contract of a KV store."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import same_bits
from ollm_conformance.parts.base import PartSuite, examples, nothing_left, refusal
from ollm_conformance.parts.kv_machine import KVStoreMachine, OpenStore, TellsGrowth
from ollm_conformance.parts.lists import KVShape
from ollm_core import DoesNotFitError, KVStore, KVStoreError
from ollm_core.memory import MemoryAccount

SMALL = KVShape()
WIDE = KVShape(2, 2, 64, torch.float32, 16)
"""A block of whole pages, so that rounding to pages hides nothing."""
PAGE = 4096


class KVStoreConformance(PartSuite):
    """Every check of a KV store. Subclass it as `TestX` and write `open_store`."""

    num_examples = 25
    """Sequences of calls that the state machine tries."""

    @classmethod
    def open_store(cls, shape: KVShape, account: MemoryAccount, directory: Path) -> KVStore:
        """A new store for `shape` that computes on the CPU.

        All its memory is reserved in `account`; its files, if it has any, are in `directory`, which
        is there and empty.
        """
        raise NotImplementedError

    @classmethod
    @contextmanager
    def opened(cls, shape: KVShape = SMALL) -> Iterator[OpenStore]:
        """A store and what it uses; it is closed afterwards, twice."""
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            account = MemoryAccount("memory", 1 << 30)
            with cls.open_store(shape, account, directory) as store:
                yield OpenStore(store, account, directory, shape, account.used)
            store.close()

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
                _refused(partial(opened.store.truncate, sequence, length), what)
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

    @check(
        "kv-store.release",
        "Releasing sequences gives back all that they held, shared blocks with the last of them.",
        look="release(); unknown sequences are ignored",
    )
    def test_release(self) -> None:
        with self.opened() as opened:
            store, empty = opened.store, opened.store.tier_bytes()
            for _ in range(2):
                sequence = store.new_sequence()
                opened.fill(sequence, 30)
                full = sum(_of(store))
                fork = store.fork(sequence)
                opened.fill(fork, 10)
                store.reserve(fork, 60)
                store.truncate(fork, 21)
                store.release(fork)
                assert sum(_of(store)) <= full, (
                    f"expected at most {full} bytes when the fork is gone, got {sum(_of(store))}"
                )
                store.release(sequence)
                store.release(sequence)
                assert store.tier_bytes() == empty, (
                    f"expected {empty} without sequences, got {store.tier_bytes()}"
                )
                assert opened.account.used == opened.empty_bytes, (
                    f"expected {opened.empty_bytes} bytes in the account, got {opened.account.used}"
                )

    @check(
        "kv-store.held-bytes",
        "A token takes the bytes of its keys and values, once per KV head, rounded up to blocks.",
        look="tier_bytes(); heads repeated to query heads; memory that is held and not told",
    )
    def test_held_bytes(self) -> None:
        with self.opened(WIDE) as opened:
            empty = sum(_of(opened.store))
            sequence = opened.store.new_sequence()
            num_blocks = 30
            opened.fill(sequence, num_blocks * WIDE.block_size - 3)
            least = WIDE.num_layers * WIDE.token_bytes * (num_blocks * WIDE.block_size - 3)
            # One more: a block that waits in memory has its place on disk already.
            most = WIDE.num_layers * WIDE.token_bytes * WIDE.block_size * (num_blocks + 1)
            held = sum(_of(opened.store)) - empty
            assert least <= held <= most, f"expected {least} to {most} bytes held, got {held}"
            told = opened.store.tier_bytes()
            used = opened.account.used
            assert told.device + told.host == used, (
                f"expected tier_bytes() to tell the {used} bytes in the account, got {told}"
            )

    @check(
        "kv-store.reserve-refused",
        "A reservation that the memory does not allow is refused, nothing changes, and with the "
        "bytes it needs it succeeds.",
        look="reserve(): reserve all in the account before anything changes",
    )
    def test_reserve_refused(self) -> None:
        with self.opened(WIDE) as opened:
            store, account = opened.store, opened.account
            sequence, other = store.new_sequence(), store.new_sequence()
            expected = opened.fill(sequence, 21)
            needed = _growth(store, other, 300)
            if not needed:
                does_not_apply("a reservation takes no memory")
            told, used = store.tier_bytes(), account.used
            for short in (needed, needed // 2, 1):
                account.limit = used + needed - short
                with pytest.raises(DoesNotFitError):
                    store.reserve(other, 300)
                assert (account.used, store.tier_bytes()) == (used, told), (
                    f"expected {used} bytes and {told} after a refusal, "
                    f"got {account.used} and {store.tier_bytes()}"
                )
                opened.expect(sequence, expected, "after a refused reservation")
                assert store.num_tokens(other) == 0, "expected a refused sequence still empty"
            account.limit = used + needed
            store.reserve(other, 300)
            new = opened.fill(other, 300, seed=1)
            opened.expect(other, new, "in the reserved room")

    @check(
        "kv-store.growth",
        "A reservation takes no more than growth_bytes said, and what is then appended takes no "
        "more memory.",
        look="growth_bytes() and reserve()",
    )
    def test_growth(self) -> None:
        with self.opened(WIDE) as opened:
            store, account = opened.store, opened.account
            if not isinstance(store, TellsGrowth):
                does_not_apply("the store does not tell what a reservation takes")
            sequence = store.new_sequence()
            length = 0
            for new in (1, 15, 1, 30, 100, 0):
                before, used = _of(store), account.used
                growth = store.growth_bytes(sequence, length + new)
                told = growth.device, growth.host, growth.disk
                store.reserve(sequence, length + new)
                taken = [now - then for now, then in zip(_of(store), before, strict=True)]
                assert all(a <= b for a, b in zip(taken, told, strict=True)), (
                    f"expected at most (device, host, disk) {told} taken, got {taken}"
                )
                assert account.used - used <= growth.device + growth.host, (
                    f"expected at most {told} in the account, got {account.used - used}"
                )
                account.limit = account.used
                opened.fill(sequence, new, seed=length)
                account.limit = 1 << 30
                length += new
                assert store.num_tokens(sequence) == length, f"expected {length} tokens"

    @check(
        "kv-store.cut-without-memory",
        "A cut of a shared block for which there is no memory loses nothing and can be tried "
        "again.",
        look="truncate(): make the copy before anything is dropped",
    )
    def test_cut_without_memory(self) -> None:
        with self.opened() as opened:
            store, account = opened.store, opened.account
            sequence = store.new_sequence()
            expected = opened.fill(sequence, 8)
            fork = store.fork(sequence)
            account.limit = account.used
            try:
                store.truncate(fork, 6)
            except DoesNotFitError:
                opened.expect(fork, expected, "a fork that could not be cut")
            account.limit = 1 << 30
            store.truncate(fork, 6)
            opened.expect(fork, [t[:, :, :6] for t in expected], "a fork that was cut")
            opened.expect(sequence, expected, "the origin")
            store.release(sequence)
            store.release(fork)
            assert account.used == opened.empty_bytes, (
                f"expected {opened.empty_bytes} bytes held, got {account.used}"
            )

    @check(
        "kv-store.wrong-requests",
        "Tokens, layers and sequences that are not there, and foreign shapes and dtypes, are "
        "refused as they are asked for.",
        look="raise KVStoreError, in one line, before anything changes",
    )
    def test_wrong_requests(self) -> None:
        with self.opened() as opened:
            store = opened.store
            sequence = store.new_sequence()
            expected = opened.fill(sequence, 6)
            one = SMALL.random(1, 0)
            other = torch.float16
            requests: dict[str, Callable[[], object]] = {
                "a fork at more tokens": lambda: store.fork(sequence, 7),
                "a fork at -1": lambda: store.fork(sequence, -1),
                "a fork of an unknown sequence": lambda: store.fork(99),
                "more tokens than there are": lambda: list(store.blocks(0, sequence, 7)),
                "-1 tokens": lambda: list(store.blocks(0, sequence, -1)),
                "the length of layer 2": lambda: store.num_tokens(sequence, 2),
                "the length of an unknown sequence": lambda: store.num_tokens(99),
                "keys for layer 2": lambda: store.append(2, sequence, one[0], one[1]),
                "keys of another dtype": lambda: store.append(
                    0, sequence, one[0].to(other), one[1].to(other)
                ),
                "fewer heads": lambda: store.append(0, sequence, one[0, :2], one[1, :2]),
                "longer heads": lambda: store.append(
                    0, sequence, one[0].repeat(1, 1, 2), one[1].repeat(1, 1, 2)
                ),
                "more keys than values": lambda: store.append(
                    0, sequence, one[0].repeat(1, 2, 1), one[1]
                ),
                "vectors": lambda: store.append(0, sequence, torch.zeros(3), torch.zeros(3)),
            }
            for what, request in requests.items():
                _refused(request, what)
                opened.expect(sequence, expected, f"after refusing {what}")

    @check(
        "kv-store.closed",
        "A closed store refuses work, can be closed again, and leaves no memory, file or thread.",
        look="close()",
    )
    def test_closed(self) -> None:
        for length in (0, 50):
            with tempfile.TemporaryDirectory() as name, nothing_left(Path(name)):
                account = MemoryAccount("memory", 1 << 30)
                store = self.open_store(SMALL, account, Path(name))
                opened = OpenStore(store, account, Path(name), SMALL, account.used)
                sequence = store.new_sequence()
                opened.fill(sequence, length)
                store.close()
                store.close()
                assert account.used == 0, f"expected an empty account, got {account.used} bytes"
                left = [path.name for path in Path(name).iterdir()]
                assert not left, f"expected no files, got {', '.join(left)}"
                _refused(store.new_sequence, "a sequence of a closed store")
                _refused(partial(store.num_tokens, sequence), "a length of a closed store")
                _refused(partial(opened.append, 0, sequence, 1, 0), "keys for a closed store")

    @check(
        "kv-store.bytes-read",
        "Bytes read from disk are counted at every reading, and none where nothing is on disk.",
        look="bytes_read",
    )
    def test_bytes_read(self) -> None:
        with self.opened(WIDE) as opened:
            store = opened.store
            sequence = store.new_sequence()
            expected = opened.fill(sequence, 40 * WIDE.block_size)
            kept = 0
            for time in range(3):
                told, before = store.tier_bytes(), store.bytes_read
                opened.expect(sequence, expected, "while bytes are counted")
                count = store.bytes_read - before
                stored = sum(t.numel() * t.element_size() for t in expected)
                # What still waits to be written may come from memory the first time.
                kept = told.device + told.host
                least = max(stored - kept, 0) if told.disk else 0
                assert least <= count <= told.disk, (
                    f"reading {time + 1}: expected {least} to {told.disk} bytes, got {count}"
                )

    @check(
        "kv-store.state-machine",
        "Whatever calls follow one another, the store holds what plain lists would.",
        look="the calls that the message lists: they are the fewest that show it",
    )
    def test_state_machine(self) -> None:
        opened = self.opened

        class Machine(KVStoreMachine):
            def __init__(self) -> None:
                super().__init__(lambda stack: stack.enter_context(opened()))

        run_state_machine_as_test(Machine, settings=examples(self.num_examples))


def _of(store: KVStore) -> tuple[int, int, int]:
    """Bytes held on the device, in host memory and on disk."""
    held = store.tier_bytes()
    return held.device, held.host, held.disk


def _growth(store: KVStore, sequence: int, num_tokens: int) -> int:
    """Memory that a reservation takes, told by the store or else found out in another sequence."""
    if isinstance(store, TellsGrowth):
        growth = store.growth_bytes(sequence, num_tokens)
        return growth.device + growth.host
    before = _of(store)
    trial = store.new_sequence()
    store.reserve(trial, num_tokens)
    after = _of(store)
    store.release(trial)
    return after[0] + after[1] - before[0] - before[1]


def _refused(request: Callable[[], object], what: str) -> None:
    """Raises AssertionError unless `request` is refused with one line."""
    refusal(KVStoreError, request, what)
