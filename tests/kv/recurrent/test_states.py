"""Recurrent states: what a sequence can go back to, what it holds, and what is kept on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kept_states import (
    CPU,
    GEOMETRY,
    check_tokens,
    found,
    keep_a_run,
    keeping,
    run,
)

from ollm_core import DoesNotFitError, KVStoreError
from ollm_core.kv.in_memory import DeviceKVStore
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.states import StateStore
from ollm_core.memory.accounts import MemoryAccount

SET_BYTES = 2 * (3 * 2 * 2 + 2 * 2 * 4)


def new_store(limit=1 << 20):
    account = MemoryAccount("memory", limit)
    states = StateStore(GEOMETRY, account, "device", CPU)
    attention = DeviceKVStore(GEOMETRY.attention_layers(), MemoryAccount("kv", 1 << 20))
    return HybridKVStore(GEOMETRY, attention, states), account


tokens = st.lists(st.integers(0, 100), min_size=1, max_size=9)


class HybridMachine(RuleBasedStateMachine):
    """A hybrid store against lists of tokens, and the positions that each may go back to."""

    def __init__(self):
        super().__init__()
        self.store, self.account = new_store()
        self.content = {}
        self.reachable = {}

    @rule()
    def begin(self):
        sequence = self.store.new_sequence()
        self.content[sequence], self.reachable[sequence] = [], set()

    @precondition(lambda self: self.content)
    @rule(data=st.data(), new=tokens, chunk=st.integers(1, 5))
    def extend(self, data, new, chunk):
        sequence = data.draw(st.sampled_from(sorted(self.content)))
        num_drafted = data.draw(st.integers(0, len(new) - 1))
        before = self.content[sequence]
        self.store.expect(sequence, num_drafted)
        growth = self.store.growth_bytes(sequence, len(before) + len(new)).device
        used = self.account.used + self.store._attention.tier_bytes().device
        run(self.store, sequence, before, new, num_drafted, chunk)
        self.store.commit(sequence)
        now = self.account.used + self.store._attention.tier_bytes().device
        assert now <= used + growth
        end = len(before) + len(new)
        self.content[sequence] = before + new
        self.reachable[sequence] = {len(before), *range(end - num_drafted, end)}

    @precondition(lambda self: self.content)
    @rule(data=st.data(), new=tokens, reached=st.integers(0, 3))
    def fail(self, data, new, reached):
        """A pass that fails before layer `reached` leaves no trace."""
        sequence = data.draw(st.sampled_from(sorted(self.content)))
        before = self.content[sequence]
        run(self.store, sequence, before, new, layers=range(reached))
        self.store.truncate(sequence, len(before))
        self.reachable[sequence] = set()

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.content)))
        length = data.draw(st.integers(0, len(self.content[sequence])))
        if length in {0, len(self.content[sequence])} | self.reachable[sequence]:
            self.store.truncate(sequence, length)
            self.content[sequence] = self.content[sequence][:length]
            self.reachable[sequence] = {n for n in self.reachable[sequence] if n <= length}
        else:
            with pytest.raises(KVStoreError, match="none after"):
                self.store.truncate(sequence, length)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def fork(self, data):
        source = data.draw(st.sampled_from(sorted(self.content)))
        ends = {0, len(self.content[source])} | self.reachable[source]
        length = data.draw(st.sampled_from(sorted(ends)))
        forked = self.store.fork(source, length)
        self.content[forked], self.reachable[forked] = self.content[source][:length], set()

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def release(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.content)))
        self.store.release(sequence)
        del self.content[sequence], self.reachable[sequence]

    @invariant()
    def holds_what_it_should(self):
        for sequence, token_ids in self.content.items():
            check_tokens(self.store, sequence, token_ids)

    @invariant()
    def pays_for_what_it_holds(self):
        layers = [
            layer
            for found in self.store._states._sequences.values()
            for layer in found.layers.values()
        ]
        states = [state for layer in layers for state in [*layer.at.values(), *layer.spares]]
        held = sum(value.nbytes for state in states for value in state)
        assert held <= self.account.used
        if not self.content:
            assert self.account.used == 0

    def teardown(self):
        self.store.close()
        assert self.account.used == 0


HybridMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestHybrid = HybridMachine.TestCase


def test_one_set_of_states_then_two():
    """A prompt takes one state a layer; what follows also holds where it began."""
    store, account = new_store()
    sequence = store.new_sequence()
    run(store, sequence, [], [1, 2, 3, 4, 5, 6, 7])
    assert account.used == SET_BYTES
    for token in (8, 9, 10):
        run(store, sequence, list(range(1, token)), [token])
        assert account.used == 2 * SET_BYTES
    assert account.peak == 2 * SET_BYTES
    assert store.tier_bytes().device == 2 * SET_BYTES + store._attention.tier_bytes().device


def test_what_does_not_fit_changes_nothing():
    """A refusal leaves the sequence as it was, in all layers."""
    store, account = new_store(limit=2 * SET_BYTES)
    sequence = store.new_sequence()
    run(store, sequence, [], [1, 2])
    held = store.tier_bytes()
    store.expect(sequence, 2)
    with pytest.raises(DoesNotFitError):
        store.reserve(sequence, 5)
    assert store.tier_bytes() == held
    check_tokens(store, sequence, [1, 2])
    assert account.used == SET_BYTES


def test_a_state_of_another_shape_is_refused():
    """With what was given and what was expected."""
    store, _ = new_store()
    sequence = store.new_sequence()
    store.reserve(sequence, 1)
    with pytest.raises(KVStoreError, match=r"layer 0 is float32 \[3, 2\].*expected bfloat16"):
        store.put_state(0, sequence, 1, (torch.zeros(3, 2), torch.zeros(2, 2)))
    with pytest.raises(KVStoreError, match="layer 0 has no keys and values"):
        store.append(0, sequence, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))


PROMPT = list(range(1, 22))


def test_kept_states_are_found(tmp_path):
    """After the prompt, at its last edge of chunks, and after the answer; nowhere else."""
    keep_a_run(tmp_path, PROMPT, answer=[50, 51, 52])
    assert found(tmp_path, [*PROMPT, 50, 51, 52, 60]) == 24
    assert found(tmp_path, [*PROMPT, 50, 70]) == 21
    assert found(tmp_path, [*PROMPT[:-1], 70, 71]) == 20
    assert found(tmp_path, [*PROMPT[:18], 70, 71]) == 0


def test_states_of_forks_are_kept(tmp_path):
    """A row that was copied or moved, as beams are, has its state kept with no pass after that."""
    with keeping(tmp_path) as store:
        sequence = store.new_sequence()
        run(store, sequence, [], PROMPT)
        store.commit(sequence)
        store.keep(sequence, 0, torch.tensor(PROMPT))
        run(store, sequence, PROMPT, [50])
        store.commit(sequence)
        store.keep(sequence, len(PROMPT), torch.tensor([50]))
        store.fork(sequence)
        store.release(sequence)
    assert found(tmp_path, [*PROMPT, 50, 60]) == 22


def test_a_store_says_where_a_sequence_can_go_back_to():
    """Just where `truncate` does not refuse."""
    store, _ = new_store()
    sequence = store.new_sequence()
    run(store, sequence, [], PROMPT)
    store.commit(sequence)
    run(store, sequence, PROMPT, [50, 51, 52], num_drafted=1)
    store.commit(sequence)
    able = [n for n in range(-1, 26) if store.can_truncate(sequence, n)]
    assert able == [0, 21, 23, 24]
    for number in {*range(-1, 26)} - {*able}:
        with pytest.raises(KVStoreError):
            store.truncate(sequence, number)
    for number in reversed(able):
        store.truncate(sequence, number)
        assert store.num_tokens(sequence) == number


def test_long_prompts_keep_states_on_their_way(tmp_path, monkeypatch):
    """One about every so many tokens."""
    monkeypatch.setattr("ollm_core.kv.recurrent.prefix_cache.SPACING", 8)
    keep_a_run(tmp_path, PROMPT)
    assert found(tmp_path, [*PROMPT[:18], 70, 71]) == 16
    assert found(tmp_path, [*PROMPT[:13], 70, 71]) == 8


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header", "other"])
def test_a_damaged_state_is_not_believed(tmp_path, damage):
    """The next shorter one is taken, and the damaged file is gone."""
    keep_a_run(tmp_path, PROMPT)
    (path,) = tmp_path.glob("ollm-states-*/21-*.state")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[4096 + 30] ^= 1
    elif damage == "header":
        data[20:60] = b"x" * 40
    elif damage == "other":
        data = bytearray(next(tmp_path.glob("ollm-states-*/20-*.state")).read_bytes())
    path.write_bytes({"cut": data[:-1], "empty": b""}.get(damage, data))
    assert found(tmp_path, [*PROMPT, 60]) == 20
    assert not path.exists() or path.read_bytes() != data


def test_states_of_another_dtype_have_files_of_their_own(tmp_path):
    """A run in one dtype neither finds nor removes what one in another has kept."""
    keep_a_run(tmp_path, PROMPT)
    files = {path.name for path in tmp_path.glob("ollm-states-*/*.state")}
    with keeping(tmp_path, replace(GEOMETRY, dtype=torch.float16)) as store:
        for num_tokens in (20, 21):
            tokens = torch.tensor(PROMPT[:num_tokens])
            assert not store._files.has(tokens)
            assert store._files.read(tokens) is None
    assert {path.name for path in tmp_path.glob("ollm-states-*/*.state")} == files
    assert found(tmp_path, [*PROMPT, 60]) == 21


def test_a_pass_that_fails_leaves_no_file(tmp_path):
    """Nor do names without content."""
    with keeping(tmp_path) as store:
        sequence = store.new_sequence()
        run(store, sequence, [], PROMPT, chunk=4, layers=(0, 1))
        assert list(tmp_path.glob("ollm-states-*/new-*"))
        store.truncate(sequence, 0)
        assert not list(tmp_path.glob("ollm-states-*/*"))


def test_files_are_the_users_own(tmp_path):
    """The states of a document are as private as the document."""
    keep_a_run(tmp_path, PROMPT)
    (directory,) = tmp_path.glob("ollm-states-*")
    assert directory.stat().st_mode & 0o777 == 0o700
    files = list(directory.iterdir())
    assert files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
