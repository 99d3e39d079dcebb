"""Block tables of which one layer slides, in stores on every tier, against a plain model."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kv_content import content, random_keys

from ollm_core import CacheKind, KVStoreError
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore, HostKVStore
from ollm_core.memory.accounts import MemoryAccount

KINDS = CacheKind("full", 3, 5), CacheKind("sliding", num_kv_heads=2, head_dim=3, window=6)
SLIDING = KVGeometry(KINDS, torch.float32, torch.device("cpu"), block_size=4)


def open_store(kind, directory, limit=10**8, geometry=SLIDING):
    """A store of one tier and the account it charges."""
    account = MemoryAccount("memory", limit)
    if kind == "disk":
        return DiskKVStore(geometry, account, Path(directory), "f00d"), account
    return (DeviceKVStore if kind == "device" else HostKVStore)(geometry, account), account


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


class SlidingMachine(RuleBasedStateMachine):
    """Any order of calls leaves what a dict of tensors would have, as far back as was promised."""

    kind = "device"
    geometry = SLIDING

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
            [random_keys(length, self.seed + i, self.geometry, layer_idx) for i in range(2)]
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


class HostMachine(SlidingMachine):
    """The same for the host tier."""

    kind = "host"


class DiskMachine(SlidingMachine):
    """The same for the disk tier."""

    kind = "disk"


SlidingMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
HostMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
DiskMachine.TestCase.settings = SlidingMachine.TestCase.settings
TestDeviceStore = SlidingMachine.TestCase
TestHostStore = HostMachine.TestCase
TestDiskStore = DiskMachine.TestCase
