"""Keys, values and states as one store: any order of calls, against lists of tokens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kept_states import (
    PROMPT,
    check_tokens,
    new_store,
    run,
)

from ollm_core import KVStoreError

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
