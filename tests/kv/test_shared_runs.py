"""What several sequences are said to share is the same blocks with the same content, and all that
they have in common.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_content import content, random_keys

from ollm_core import CacheKind, SharedRun, StateShape
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.memory import SHARED
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore, HostKVStore
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.states import state_store
from ollm_core.kv.shared_runs import shared_runs
from ollm_core.kv.simulated import SimulatedKVStore
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory

BLOCK = 4
KINDS = CacheKind("full", 2, 3), CacheKind("sliding", 1, 3, window=6), CacheKind("full", 1, 5)
GEOMETRY = KVGeometry(KINDS, torch.float32, torch.device("cpu"), BLOCK)
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "fork", "fork", "truncate", "release", "new"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    min_size=8,
    max_size=40,
)


def open_store(tier, directory):
    account = MemoryAccount("memory", 10**8)
    if tier == "disk":
        return DiskKVStore(GEOMETRY, account, Path(directory), "f00d")
    return (DeviceKVStore if tier == "device" else HostKVStore)(GEOMETRY, account)


class Grown:
    """A store after any calls, and what each of its sequences was given, layer by layer."""

    def __init__(self, store, actions):
        self.store = store
        self.given = {store.new_sequence(): [torch.zeros(2, k.num_kv_heads, 0, k.head_dim)
                                             for k in KINDS]}  # fmt: skip
        for seed, (name, which, number) in enumerate(actions):
            sequence = sorted(self.given)[which % len(self.given)]
            getattr(self, name)(sequence, number, seed)

    def append(self, sequence, number, seed):
        num_new = 1 + number % 11
        for layer_idx in range(len(KINDS)):
            new = [random_keys(num_new, 2 * seed + i, GEOMETRY, layer_idx) for i in range(2)]
            self.store.append(layer_idx, sequence, *new)
            before = self.given[sequence][layer_idx]
            self.given[sequence][layer_idx] = torch.cat([before, torch.stack(new)], 2)

    def fork(self, sequence, number, seed):
        num_tokens = self._length(sequence, number)
        if self.store.can_truncate(sequence, num_tokens):
            forked = self.store.fork(sequence, num_tokens)
            self.given[forked] = [one[:, :, :num_tokens] for one in self.given[sequence]]

    def truncate(self, sequence, number, seed):
        num_tokens = self._length(sequence, number)
        if self.store.can_truncate(sequence, num_tokens):
            self.store.truncate(sequence, num_tokens)
            self.given[sequence] = [one[:, :, :num_tokens] for one in self.given[sequence]]

    def release(self, sequence, number, seed):
        if len(self.given) > 1:
            self.store.release(sequence)
            del self.given[sequence]

    def new(self, sequence, number, seed):
        self.given[self.store.new_sequence()] = [one[:, :, :0] for one in self.given[sequence]]

    def _length(self, sequence, number):
        """A length that it has: mostly all or near it, as windows do not go back far."""
        total = self.given[sequence][0].shape[2]
        return max(total - (0, 0, 1, 2, 4, 5, 9, 99)[number % 8], 0)

    def common(self, layer_idx, one, other):
        """How many leading blocks two sequences have in common, looked at one by one."""
        tables = [self.store._table(layer_idx, sequence).blocks for sequence in (one, other)]
        count = 0
        while count in tables[0] and tables[0][count] == tables[1].get(count):
            count += 1
        return count


def check_tree(runs, num_rows):
    """Raises AssertionError unless the runs of each row begin at 0 and leave nothing out, and rows
    that are together in a run are together in all before it.
    """
    for row in range(num_rows):
        end = 0
        for number, run in enumerate(runs):
            if row in run.rows:
                assert run.first == end < run.end
                end = run.end
                inside = [one for one in runs[:number] if row in one.rows]
                assert all(set(run.rows) < set(one.rows) for one in inside)
    for run in runs:
        assert len(set(run.rows)) == len(run.rows) > 1
        assert run.first % BLOCK == run.end % BLOCK == 0


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@settings(
    max_examples=40 * int(os.environ.get("OLLM_EXAMPLES", "1")), deadline=None, derandomize=True,
    database=None, suppress_health_check=[HealthCheck.differing_executors],
)  # fmt: skip
@given(actions=ACTIONS, numbers=st.lists(st.integers(0, 60), min_size=12, max_size=12))
def test_what_is_shared_is_the_same_and_all_that_is(tier, actions, numbers):
    """After any forks, truncations, appends and releases, for any rows with any ends."""
    with tempfile.TemporaryDirectory() as directory, open_store(tier, directory) as store:
        grown = Grown(store, actions)
        rows = sorted(grown.given)[-8:]
        ends = [
            min(number, store.num_tokens(sequence))
            for sequence, number in zip(rows, numbers, strict=False)
        ]
        assert store.shared_runs(1, rows, ends) == ()  # a window
        for layer_idx in (0, 2):
            runs = store.shared_runs(layer_idx, rows, ends)
            check_tree(runs, len(rows))
            for run in runs:
                expected = grown.given[rows[run.rows[0]]][layer_idx][:, :, run.first : run.end]
                for row in run.rows:
                    assert run.end <= ends[row]
                    found = content(store, layer_idx, rows[row], run.end, run.first)
                    assert torch.equal(found, expected)
                    given_ = grown.given[rows[row]][layer_idx][:, :, run.first : run.end]
                    assert torch.equal(given_, expected)
            for i, one in enumerate(rows):
                for j in range(i):
                    said = sum(run.end - run.first for run in runs if {i, j} <= set(run.rows))
                    most = min(grown.common(layer_idx, one, rows[j]), ends[i] // BLOCK,
                               ends[j] // BLOCK)  # fmt: skip
                    assert said == most * BLOCK


def test_questions_on_documents_and_samples_of_a_question():
    """Two documents, one with two questions and one with three, of which one has two samples; and
    a text that is alone.
    """
    with DeviceKVStore(GEOMETRY, MemoryAccount("memory", 10**8)) as store:

        def grow(sequence, num_tokens):
            for layer_idx in range(3):
                keys = random_keys(num_tokens, sequence, GEOMETRY, layer_idx)
                store.append(layer_idx, sequence, keys, keys)
            return sequence

        one, other, alone = (grow(store.new_sequence(), n) for n in (18, 9, 30))
        questions = [grow(store.fork(document), 7) for document in (one, one, other, other, other)]
        sample = grow(store.fork(questions[2]), 1)
        rows = [alone, *questions, sample]
        ends = [store.num_tokens(sequence) for sequence in rows]
        assert list(store.shared_runs(0, rows, ends)) == [
            SharedRun((1, 2), 0, 16),
            SharedRun((3, 4, 5, 6), 0, 8),
            SharedRun((3, 6), 8, 16),
        ]
        assert list(store.shared_runs(2, rows[:3], [3, 12, 11])) == [SharedRun((1, 2), 0, 8)]
        assert list(store.shared_runs(0, [one], [18])) == []


def test_the_longest_tables_are_not_walked():
    """A table of a hundred thousand blocks is looked at a few times."""

    class Looked(dict):
        times = 0

        def __getitem__(self, index):
            Looked.times += 1
            return super().__getitem__(index)

    tables = [Looked({i: i for i in range(100_000)}) for _ in range(4)]
    tables[3] |= {i: -i for i in range(70_000, 100_000)}
    assert shared_runs(tables, [100_000] * 4, 2) == [
        SharedRun((0, 1, 2, 3), 0, 140_000),
        SharedRun((0, 1, 2), 140_000, 200_000),
    ]
    assert Looked.times < 100


def test_a_dry_run_is_told_the_same():
    """A simulated store shares what a real one does."""
    accounts = PerMemory(MemoryAccount("device", 10**8), MemoryAccount("host", 10**8))
    for tier in ("device", "host", "disk"):
        with SimulatedKVStore(tier, GEOMETRY, accounts, SHARED) as store:
            first = store.new_sequence()
            store.advance(first, 13, 13)
            forks = [store.fork(first) for _ in range(3)]
            assert list(store.shared_runs(0, forks, [13] * 3)) == [SharedRun((0, 1, 2), 0, 12)]


def test_layers_with_a_state_share_nothing():
    """Of a hybrid store, whose layers with keys are asked by the model's numbers."""
    full, state = CacheKind("full", 2, 3), CacheKind("recurrent", states=(StateShape((2, 3)),))
    geometry = KVGeometry((state, full), torch.float32, torch.device("cpu"), BLOCK)
    account = MemoryAccount("memory", 10**8)
    attention = DeviceKVStore(geometry.attention_layers(), account)
    states = state_store("device", geometry, PerMemory(account, account), SHARED, geometry.device)
    with HybridKVStore(geometry, attention, states) as store:
        sequence = store.new_sequence()
        store.reserve(sequence, 9)
        keys = random_keys(9, 0, geometry, 1)
        store.append(1, sequence, keys, keys)
        store.put_state(0, sequence, 9, [torch.zeros(2, 3)])
        rows = [sequence, store.fork(sequence)]
        assert list(store.shared_runs(1, rows, [9, 9])) == [SharedRun((0, 1), 0, 8)]
        assert list(store.shared_runs(0, rows, [9, 9])) == []
