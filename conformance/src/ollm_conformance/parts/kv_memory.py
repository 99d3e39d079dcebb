"""Checks of the memory that a KV store takes and gives back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.parts.base import nothing_left, refusal
from ollm_conformance.parts.kv_machine import OpenStore
from ollm_conformance.parts.kv_suite import SMALL, KVStoreSuite
from ollm_conformance.parts.lists import KVShape
from ollm_core import DoesNotFitError, KVStore, KVStoreError, MemoryAccount

WIDE = KVShape(2, 2, 64, torch.float32, 16)
"""A block of whole pages, so that rounding to pages hides nothing."""


class KVMemory(KVStoreSuite):
    """No more is held than is told and allowed, and nothing when it is over."""

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
                what = f"a reservation of {needed} bytes where {needed - short} are free"
                refusal(DoesNotFitError, partial(store.reserve, other, 300), what)
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
        "kv-store.reserve-undone",
        "Truncating to the length that is there gives back all that a reservation took, used in "
        "some layers or in none, and loses no token.",
        look="truncate(): it undoes a pass that was refused before anything was appended",
    )
    def test_reserve_undone(self) -> None:
        for length in (0, 21, 32):
            with self.opened(WIDE) as opened:
                store, account = opened.store, opened.account
                sequence = store.new_sequence()
                expected = opened.fill(sequence, length)
                store.truncate(sequence, length)  # what stood ready for the next token may go
                told, used = store.tier_bytes(), account.used
                for num_new in (0, 1, 40):
                    store.reserve(sequence, length + 300)
                    opened.append(0, sequence, num_new, seed=1)
                    store.truncate(sequence, length)
                    assert (account.used, store.tier_bytes()) == (used, told), (
                        f"expected {used} bytes and {told} when a reservation after {length} is "
                        f"undone, got {account.used} and {store.tier_bytes()}"
                    )
                    opened.expect(sequence, expected, "after a reservation was undone")

    @check(
        "kv-store.growth",
        "A reservation takes no more than growth_bytes said, and what is then appended takes no "
        "more memory.",
        look="growth_bytes() and reserve()",
    )
    def test_growth(self) -> None:
        with self.opened(WIDE) as opened:
            store, account = opened.store, opened.account
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
            # Much more than its buffers, so that reading cannot come from them.
            whole = WIDE.num_layers * WIDE.token_bytes
            expected = opened.fill(sequence, max(640, 3 * opened.empty_bytes // whole))
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


def _of(store: KVStore) -> tuple[int, int, int]:
    """Bytes held on the device, in host memory and on disk."""
    held = store.tier_bytes()
    return held.device, held.host, held.disk


def _growth(store: KVStore, sequence: int, num_tokens: int) -> int:
    """Memory that a reservation takes."""
    growth = store.growth_bytes(sequence, num_tokens)
    return growth.device + growth.host


def _refused(request: Callable[[], object], what: str) -> None:
    """Raises AssertionError unless `request` is refused with one line."""
    refusal(KVStoreError, request, what)
