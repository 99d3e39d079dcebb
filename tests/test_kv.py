"""KV stores against a plain model: lists of tokens."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ollm_core import CacheKind, DoesNotFitError, KVStoreError, ReadError
from ollm_core.kv import DeviceKVStore, DiskKVStore, HostKVStore, KVGeometry
from ollm_core.kv.files import MAGIC
from ollm_core.memory import MemoryAccount

GEOMETRY = KVGeometry.uniform(2, 3, 5, torch.float32, torch.device("cpu"), block_size=4)
SLIDING = replace(
    GEOMETRY, kinds=(GEOMETRY.kinds[0], CacheKind("sliding", num_kv_heads=2, head_dim=3, window=6))
)
STORES = ["device", "host", "disk"]


def open_store(kind, directory, limit=10**8, geometry=GEOMETRY):
    """A store of one tier and the account it charges."""
    account = MemoryAccount("memory", limit)
    if kind == "disk":
        return DiskKVStore(geometry, account, Path(directory), "f00d"), account
    return (DeviceKVStore if kind == "device" else HostKVStore)(geometry, account), account


def tokens(num_tokens, seed, geometry=GEOMETRY, layer_idx=0):
    """Random keys or values [G, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    kind = geometry.kinds[layer_idx]
    shape = kind.num_kv_heads, num_tokens, kind.head_dim
    return torch.randn(shape, generator=generator).to(geometry.dtype)


def content(store, layer_idx, sequence, num_tokens=None, first=0):
    """Everything `blocks` gives, as [2, G, S, D]."""
    pairs = [torch.stack(pair) for pair in store.blocks(layer_idx, sequence, num_tokens, first)]
    kind = store.geometry.kinds[layer_idx]
    empty = torch.empty(2, kind.num_kv_heads, 0, kind.head_dim, dtype=store.geometry.dtype)
    return torch.cat([empty, *pairs], dim=2)


def fill(store, sequence, num_tokens, seed=0):
    """Append to both layers; returns what layer 0 has."""
    for layer_idx in range(store.geometry.num_layers):
        keys, values = tokens(num_tokens, seed), tokens(num_tokens, seed + 1)
        store.append(layer_idx, sequence, keys, values)
    return torch.stack([keys, values])


@dataclass
class Expected:
    """What a sequence of the model holds: keys and values of each layer, and how far they go
    back.
    """

    layers: list[torch.Tensor]
    first: list[int]
    """Per layer, the first position that the store has promised to keep."""

    @property
    def num_tokens(self):
        return self.layers[0].shape[2]

    def cut(self, num_tokens):
        return Expected([t[:, :, :num_tokens] for t in self.layers], list(self.first))


class KVStoreMachine(RuleBasedStateMachine):
    """Any order of calls leaves what a dict of tensors would have."""

    kind = "device"
    geometry = GEOMETRY

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store, self.account = open_store(
            self.kind, self.directory.name, geometry=self.geometry
        )
        self.fixed = self.account.used
        self.model: dict[int, Expected] = {}
        self.seed = 0

    def pick(self, index):
        return sorted(self.model)[index % len(self.model)]

    def add(self, layer_idx, sequence, length):
        """Append to one layer of the store and of the model."""
        self.seed += 2
        new = torch.stack(
            [tokens(length, self.seed + i, self.geometry, layer_idx) for i in range(2)]
        )
        self.store.append(layer_idx, sequence, new[0], new[1])
        layers = self.model[sequence].layers
        self.let_go(layer_idx, sequence)
        layers[layer_idx] = torch.cat([layers[layer_idx], new], dim=2)

    def let_go(self, layer_idx, sequence):
        """What a sliding layer need not keep at its present length."""
        expected = self.model[sequence]
        num_tokens = expected.layers[layer_idx].shape[2]
        needed = self.geometry.first_needed(layer_idx, num_tokens)
        if self.geometry.kinds[layer_idx].window:
            needed -= self.geometry.slack
        expected.first[layer_idx] = max(expected.first[layer_idx], needed)

    def may_go_back(self, sequence, length):
        """Whether the store has promised what a cut to `length` needs."""
        return all(
            self.geometry.first_needed(layer_idx, length) >= first
            for layer_idx, first in enumerate(self.model[sequence].first)
        )

    @rule()
    def new(self):
        empty = [
            torch.empty(2, kind.num_kv_heads, 0, kind.head_dim) for kind in self.geometry.kinds
        ]
        self.model[self.store.new_sequence()] = Expected(empty, [0] * len(empty))

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9), lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3))
    def append(self, index, lengths):
        sequence = self.pick(index)
        for layer_idx in range(2):
            for length in lengths:
                self.add(layer_idx, sequence, length)

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9), extra=st.integers(0, 20))
    def reserve(self, index, extra):
        sequence = self.pick(index)
        length = self.store.num_tokens(sequence) + extra
        growth = self.store.growth_bytes(sequence, length)
        used = self.account.used
        self.store.reserve(sequence, length)
        assert self.account.used - used == growth.device + growth.host
        assert self.store.growth_bytes(sequence, length).host == 0

    @precondition(lambda self: self.model)
    @rule(
        index=st.integers(0, 9),
        num_new=st.integers(1, 60) | st.just(60),
        chunk=st.integers(1, 20) | st.just(5),
        stop=st.none() | st.integers(0, 40) | st.just(15),
    )
    def weight_pass(self, index, num_new, chunk, stop):
        """Chunk by chunk, layer by layer, inside what was reserved; undone if it stops early."""
        sequence = self.pick(index)
        start = self.store.num_tokens(sequence)
        for layer_idx in range(2):
            self.let_go(layer_idx, sequence)
        before = self.model[sequence].cut(start)
        growth = self.store.growth_bytes(sequence, start + num_new, chunk)
        held, used = self.store.tier_bytes(), self.account.used
        self.store.reserve(sequence, start + num_new, chunk)
        reserved = self.store.tier_bytes()
        assert self.account.used - used == growth.device + growth.host
        assert reserved.disk - held.disk == growth.disk
        steps = [
            (layer_idx, min(chunk, num_new - begin))
            for layer_idx in range(2)
            for begin in range(0, num_new, chunk)
        ]
        for layer_idx, length in steps[:stop]:
            self.add(layer_idx, sequence, length)
            now = self.store.tier_bytes()
            assert now.device + now.host <= reserved.device + reserved.host
            assert now.disk <= reserved.disk
        if stop is None or stop >= len(steps):
            self.store.commit(sequence)
            for layer_idx in range(2):
                self.let_go(layer_idx, sequence)
        else:
            self.store.truncate(sequence, start)
            self.model[sequence] = before

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9), share=st.floats(0, 1))
    def truncate(self, index, share):
        sequence = self.pick(index)
        length = int(share * self.store.num_tokens(sequence))
        try:
            self.store.truncate(sequence, length)
        except KVStoreError:
            assert not self.may_go_back(sequence, length)
        else:
            self.model[sequence] = self.model[sequence].cut(length)

    @precondition(lambda self: self.model and len(self.model) < 6)
    @rule(index=st.integers(0, 9), share=st.floats(0, 1))
    def fork(self, index, share):
        sequence = self.pick(index)
        length = int(share * self.store.num_tokens(sequence))
        try:
            forked = self.store.fork(sequence, length)
        except KVStoreError:
            assert not self.may_go_back(sequence, length)
        else:
            self.model[forked] = self.model[sequence].cut(length)

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9))
    def release(self, index):
        sequence = self.pick(index)
        self.store.release(sequence)
        del self.model[sequence]

    @invariant()
    def same_content(self):
        for sequence, expected in self.model.items():
            length = expected.num_tokens
            assert self.store.num_tokens(sequence) == length
            for layer_idx, first in enumerate(expected.first):
                first = min(first, length)
                kept = expected.layers[layer_idx]
                for end in (length, (first + length) // 2):
                    found = content(self.store, layer_idx, sequence, end, first)
                    assert torch.equal(found, kept[:, :, first:end])

    @invariant()
    def nothing_is_lost(self):
        if not self.model:
            assert self.account.used == self.fixed

    def teardown(self):
        self.store.close()
        self.store.close()
        assert self.account.used == 0
        assert os.listdir(self.directory.name) == []
        self.directory.cleanup()


class SlidingMachine(KVStoreMachine):
    """The same where one layer slides, and has heads of another shape."""

    geometry = SLIDING


class HostMachine(KVStoreMachine):
    """The same for the host tier."""

    kind = "host"
    geometry = SLIDING


class DiskMachine(KVStoreMachine):
    """The same for the disk tier."""

    kind = "disk"


class SlidingDiskMachine(KVStoreMachine):
    """The same for the disk tier where one layer slides."""

    kind = "disk"
    geometry = SLIDING


KVStoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
SlidingMachine.TestCase.settings = KVStoreMachine.TestCase.settings
HostMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
DiskMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
SlidingDiskMachine.TestCase.settings = DiskMachine.TestCase.settings
TestDeviceStore = KVStoreMachine.TestCase
TestSlidingStore = SlidingMachine.TestCase
TestHostStore = HostMachine.TestCase
TestDiskStore = DiskMachine.TestCase
TestSlidingDiskStore = SlidingDiskMachine.TestCase


@pytest.mark.parametrize("kind", STORES)
def test_what_does_not_fit_changes_nothing(kind, tmp_path):
    """A reservation past the limit is refused, and what was there is still there."""
    store, account = open_store(kind, tmp_path)
    with store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 6)
        used = account.used
        account.limit = used + 1
        other = store.new_sequence()
        with pytest.raises(DoesNotFitError):
            store.reserve(other, 9)
        assert account.used == used
        assert torch.equal(content(store, 0, sequence), expected)


@pytest.mark.parametrize("kind", STORES)
def test_wrong_requests(kind, tmp_path):
    """A foreign shape or dtype, an unknown sequence, too many tokens: one line each."""
    store, _ = open_store(kind, tmp_path)
    sequence = store.new_sequence()
    fill(store, sequence, 6)
    with pytest.raises(KVStoreError, match="has 6 tokens; cannot truncate to 7"):
        store.truncate(sequence, 7)
    with pytest.raises(KVStoreError, match="cannot read 7"):
        list(store.blocks(0, sequence, 7))
    with pytest.raises(KVStoreError, match="cannot fork at 7"):
        store.fork(sequence, 7)
    with pytest.raises(KVStoreError, match=r"expected torch\.float32"):
        store.append(0, sequence, tokens(1, 0).half(), tokens(1, 0))
    with pytest.raises(KVStoreError, match="no sequence 99"):
        store.num_tokens(99)
    store.release(99)
    store.close()
    with pytest.raises(KVStoreError, match="closed"):
        store.new_sequence()


def test_disk_store_is_private_and_removes_only_its_own(tmp_path):
    """Directory 0700, files 0600 with a readable header; a stranger's file in the way survives."""
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "mine.txt").write_text("keep")
    store, _ = open_store("disk", tmp_path / "kv")
    fill(store, store.new_sequence(), 9)
    (made,) = [path for path in (tmp_path / "kv").iterdir() if path.is_dir()]
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    files = sorted(made.iterdir())
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 2
    page = files[1].read_bytes()[:4096]
    header = json.loads(page[len(MAGIC) :].rstrip(b"\0"))
    assert page.startswith(MAGIC)
    assert (header["layer"], header["fingerprint"], header["version"]) == (1, "f00d", 1)
    (made / "stranger").write_text("keep")
    store.close()
    assert [path.name for path in made.iterdir()] == ["stranger"]
    assert (tmp_path / "kv" / "mine.txt").read_text() == "keep"


def test_unwritable_directory(tmp_path):
    """A KV directory that cannot be made is one line that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(KVStoreError, match=r"file/kv: cannot keep KV there"):
        open_store("disk", tmp_path / "file" / "kv")


def test_full_disk_is_refused_before_writing(tmp_path, monkeypatch):
    """No room for the reservation: refused with the bytes, files as long as before."""
    store, account = open_store("disk", tmp_path)
    with store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 6)
        sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*/*"))]
        real, calls = os.posix_fallocate, []

        def full(number, offset, length):
            calls.append(length)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            real(number, offset, length)

        monkeypatch.setattr(os, "posix_fallocate", full)
        used = account.used
        with pytest.raises(DoesNotFitError, match="bytes free, or name"):
            store.reserve(sequence, 100)
        monkeypatch.undo()
        assert [path.stat().st_size for path in sorted(tmp_path.glob("*/*"))] == sizes
        assert account.used == used
        assert torch.equal(content(store, 0, sequence), expected)


def test_failed_write_surfaces(tmp_path, monkeypatch):
    """A write that fails behind the scenes is reported by the next sealed block."""
    store, _ = open_store("disk", tmp_path)
    sequence = store.new_sequence()

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(ReadError, match="Input/output error"):
        fill(store, sequence, 200)
    monkeypatch.undo()
    store.close()
    assert not list(tmp_path.iterdir())


def test_file_cut_short(tmp_path):
    """A KV file that lost its end gives a ReadError."""
    store, _ = open_store("disk", tmp_path)
    with store:
        sequence = store.new_sequence()
        fill(store, sequence, 200)
        fill(store, sequence, 40)  # the writes of the first have been waited for
        for path in tmp_path.glob("*/*.kv"):
            os.truncate(path, 4096 * 2)
        with pytest.raises(ReadError, match="ends at byte"):
            content(store, 0, sequence)


def test_iterators_may_interleave_and_be_left(tmp_path):
    """Two readers at once, and one given up half-way, do not disturb each other."""
    store, _ = open_store("disk", tmp_path)
    with store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 100)
        abandoned = store.blocks(0, sequence)
        next(abandoned)
        del abandoned
        pairs = zip(store.blocks(0, sequence), store.blocks(1, sequence), strict=True)
        found = [(torch.stack(one), torch.stack(other)) for one, other in pairs]
        for i in range(2):
            assert torch.equal(torch.cat([pair[i] for pair in found], dim=2), expected)


def test_where_direct_io_is_refused():
    """In a directory without O_DIRECT the store works through the page cache."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no memory file system here")
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        store, _ = open_store("disk", directory)
        with store:
            sequence = store.new_sequence()
            expected = fill(store, sequence, 50)
            assert torch.equal(content(store, 1, sequence), expected)


def test_a_block_that_was_not_written_is_never_read_as_zeros(tmp_path, monkeypatch):
    """After one failed write every call says so, until the block is dropped; then all works."""
    store, _ = open_store("disk", tmp_path)
    with store:
        sequence = store.new_sequence()
        keys = tokens(6, 1)
        store.append(1, sequence, keys, keys)
        wait_for_writes(store)
        real = os.pwritev

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwritev", full)
        store.append(0, sequence, keys, keys)
        wait_for_writes(store)
        monkeypatch.setattr(os, "pwritev", real)
        for _ in range(2):
            with pytest.raises(DoesNotFitError, match="writing failed"):
                store.append(0, sequence, keys, keys)
            with pytest.raises(DoesNotFitError, match="writing failed"):
                store.reserve(sequence, 100)
            with pytest.raises(DoesNotFitError, match="writing failed"):
                store.blocks(0, sequence)
            store.truncate(sequence, 6)
        store.truncate(sequence, 3)  # brings the block back from memory
        assert torch.equal(content(store, 0, sequence)[0], keys[:, :3])
        assert torch.equal(store_again(store, sequence, keys), torch.cat([keys[:, :3], keys], 1))


@pytest.mark.parametrize("kind", STORES)
def test_cut_of_a_shared_block_that_does_not_fit(kind, tmp_path):
    """Without memory for a copy nothing is lost, and it can be tried again."""
    store, account = open_store(kind, tmp_path)
    fixed = account.used
    with store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 8)
        fork = store.fork(sequence)
        account.limit = account.used
        with pytest.raises(DoesNotFitError):
            store.truncate(fork, 6)
        assert [store.num_tokens(fork, layer_idx) for layer_idx in range(2)] == [8, 8]
        assert torch.equal(content(store, 0, fork), expected)
        account.limit = 10**8
        store.truncate(fork, 6)
        assert torch.equal(content(store, 0, fork), expected[:, :, :6])
        assert torch.equal(content(store, 0, sequence), expected)
        store.release(sequence)
        store.release(fork)
        assert account.used == fixed


def test_fork_that_cannot_be_read_leaves_nothing(tmp_path):
    """A ReadError in a fork leaves the account as it was."""
    store, account = open_store("disk", tmp_path)
    with store:
        sequence = store.new_sequence()
        fill(store, sequence, 8)
        wait_for_writes(store)
        for path in tmp_path.glob("*/*.kv"):
            os.truncate(path, 4096)
        used = account.used
        with pytest.raises(ReadError, match="ends at byte"):
            store.fork(sequence, 6)
        with pytest.raises(ReadError, match="ends at byte"):
            store.truncate(sequence, 6)
        assert store.num_tokens(sequence) == 8
        store.truncate(sequence, 0)
        assert account.used < used


def test_every_live_iterator_is_accounted(tmp_path):
    """Staging beyond the first set is charged while its iterator lives, and many runs are read."""
    account = MemoryAccount("memory", 10**8)
    with DiskKVStore(GEOMETRY, account, tmp_path, "f00d", staging_bytes=2 * 4096) as store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 43)
        used = account.used
        iterators = [store.blocks(0, sequence) for _ in range(3)]
        rows = [[torch.stack(pair) for pair in pairs] for pairs in zip(*iterators, strict=True)]
        for i in range(3):
            assert torch.equal(torch.cat([row[i] for row in rows], dim=2), expected)
        iterators = [store.blocks(0, sequence) for _ in range(3)]
        for iterator in iterators:
            next(iterator)
        assert account.used == used + 2 * 2 * 2 * 4096
        del iterators, iterator
        assert account.used == used


def test_disk_space_is_given_back(tmp_path):
    """Files shrink when their last blocks are freed, and freed slots are used again."""
    store, _ = open_store("disk", tmp_path)
    with store:
        first, second = store.new_sequence(), store.new_sequence()
        fill(store, first, 40)
        expected = fill(store, second, 40)
        size = store.tier_bytes().disk
        assert size == sum(path.stat().st_size for path in tmp_path.glob("*/*"))
        store.release(first)
        assert store.growth_bytes(second, 80).disk == 0
        store.reserve(second, 80)
        assert store.tier_bytes().disk == size
        assert torch.equal(content(store, 0, second), expected)
        store.release(second)
        assert store.tier_bytes().disk == 2 * 4096


def test_closing_under_an_iterator(tmp_path):
    """An iterator that outlives its store says so, and the account stays even."""
    store, account = open_store("disk", tmp_path)
    sequence = store.new_sequence()
    fill(store, sequence, 43)
    iterator = store.blocks(0, sequence)
    next(iterator)
    store.close()
    with pytest.raises(KVStoreError, match="closed"):
        next(iterator)
    del iterator
    assert account.used == 0


@pytest.mark.parametrize(
    "request_",
    [
        lambda store, sequence: store.fork(sequence, -1),
        lambda store, sequence: store.blocks(0, sequence, -1),
        lambda store, sequence: store.num_tokens(sequence, 2),
        lambda store, sequence: store.append(2, sequence, tokens(1, 0), tokens(1, 0)),
        lambda store, sequence: store.append(0, sequence, torch.zeros(3), torch.zeros(3)),
    ],
)
def test_requests_out_of_range(request_):
    """Negative counts, layers that are not there and vectors are refused as they are made."""
    store, _ = open_store("host", None)
    sequence = store.new_sequence()
    fill(store, sequence, 6)
    with pytest.raises(KVStoreError):
        request_(store, sequence)


@pytest.mark.parametrize("refused", ["posix_fallocate", "pwritev"])
def test_file_systems_that_can_do_less(refused, tmp_path, monkeypatch):
    """No preallocation, or O_DIRECT refused at its first use: slower guarantees, same content."""
    real = getattr(os, refused)

    def refuse(file, *arguments):
        if refused == "posix_fallocate":
            raise OSError(95, "Operation not supported")
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(file, *arguments)

    monkeypatch.setattr(os, refused, refuse)
    store, _ = open_store("disk", tmp_path)
    with store:
        sequence = store.new_sequence()
        expected = fill(store, sequence, 50)
        wait_for_writes(store)
        assert torch.equal(content(store, 1, sequence), expected)


def test_process_that_ends_without_closing_leaves_nothing(tmp_path):
    """The user's text does not stay on the disk when a program forgets to close the store."""
    code = f"""
import torch
from pathlib import Path
from ollm_core.kv import DiskKVStore, KVGeometry
from ollm_core.memory import MemoryAccount
geometry = KVGeometry.uniform(1, 1, 4, torch.float32, torch.device("cpu"), 4)
store = DiskKVStore(geometry, MemoryAccount("memory", 10**8), Path({str(tmp_path)!r}), "f00d")
store.append(0, store.new_sequence(), torch.ones(1, 9, 4), torch.ones(1, 9, 4))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert list(tmp_path.iterdir()) == []


def wait_for_writes(store):
    """Return when the disk has, or has refused, every sealed block."""
    while store._storage._pending:
        time.sleep(0.001)


def store_again(store, sequence, keys):
    """Append to layer 0, and all keys it then has."""
    store.append(0, sequence, keys, keys)
    return content(store, 0, sequence)[0]
