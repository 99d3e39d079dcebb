"""Which experts are kept: never too many, those that are asked most, and few copies."""

from __future__ import annotations

import itertools

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ollm_core.weights.experts.policy import ExpertShares, ExpertTier

NUM_EXPERTS = {1: 5, 4: 3, 5: 8}
EVERY = [(i, e) for i, count in NUM_EXPERTS.items() for e in range(count)]


class TierAgainstSet(RuleBasedStateMachine):
    """A tier beside a plain set and shares in plain numbers."""

    def __init__(self):
        super().__init__()
        self.shares = ExpertShares(NUM_EXPERTS)
        self.tier = ExpertTier(self.shares)
        self.kept, self.capacity = set(), 0
        self.share = {(i, e): 1 / NUM_EXPERTS[i] for i, e in EVERY}

    @rule(data=st.data(), layer_idx=st.sampled_from(list(NUM_EXPERTS)), done=st.floats(0, 1))
    def layer_asks(self, data, layer_idx, done):
        """A layer asks; what is planned is put in, or the pass breaks off in between."""
        numbers = st.integers(0, NUM_EXPERTS[layer_idx] - 1)
        counts = data.draw(st.dictionaries(numbers, st.integers(1, 50)))
        self.shares.note(layer_idx, counts)
        if total := sum(counts.values()):
            old = 0.5 ** (total / (8 * NUM_EXPERTS[layer_idx]))
            for e in range(NUM_EXPERTS[layer_idx]):
                share = self.share[layer_idx, e] * old
                self.share[layer_idx, e] = share + (1 - old) * counts.get(e, 0) / total
        new = [e for e in counts if (layer_idx, e) not in self.tier]
        assert new == [e for e in counts if (layer_idx, e) not in self.kept]
        plan = self.tier.plan(layer_idx, counts, new)
        going = [expert for expert in plan.values() if expert is not None]
        assert plan.keys() <= set(new)
        assert len(going) == len(set(going))
        assert set(going) <= self.kept - {(layer_idx, e) for e in counts}
        room = self.capacity - len(self.kept)
        assert len(plan) - len(going) == min(room, len(new))  # room is used
        for e, gone in plan.items():
            if gone is not None:
                assert self.share[layer_idx, e] > 1.24 * self.share[gone]
        for e, gone in list(plan.items())[: round(done * len(plan))]:
            if gone is not None:
                assert self.tier.pop(gone) == f"bytes of {gone}"
                self.kept.remove(gone)
            self.tier.put((layer_idx, e), f"bytes of {(layer_idx, e)}")
            self.kept.add((layer_idx, e))

    @rule(capacity=st.integers(0, len(EVERY) + 1))
    def budget_changes(self, capacity):
        """What goes is what has the least shares."""
        before = set(self.kept)
        self.tier.resize(capacity)
        self.kept, self.capacity = {e for e in EVERY if e in self.tier}, capacity
        gone = before - self.kept
        assert len(self.kept) == min(len(before), capacity)
        if gone and self.kept:
            most, least = max(map(self.share.get, gone)), min(map(self.share.get, self.kept))
            assert most <= least * 1.0001

    @invariant()
    def holds_what_the_set_has(self):
        """Never more than the capacity, and for each expert its own."""
        assert len(self.tier) == len(self.kept) <= self.capacity
        assert all((expert in self.tier) == (expert in self.kept) for expert in EVERY)
        assert all(self.tier[expert] == f"bytes of {expert}" for expert in self.kept)

    @invariant()
    def shares_are_shares(self):
        """Those of a layer add up to one, and are those of the plain numbers."""
        found = torch.tensor([self.share[expert] for expert in EVERY])
        assert torch.allclose(self.shares.values, found, atol=1e-5)


TestTier = TierAgainstSet.TestCase
TestTier.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def run(tier, shares, layer_idx, counts):
    """One layer of a pass: how many were found, how many copied."""
    shares.note(layer_idx, counts)
    new = [e for e in counts if (layer_idx, e) not in tier]
    plan = tier.plan(layer_idx, counts, new)
    for e, gone in plan.items():
        if gone is not None:
            tier.pop(gone)
        tier.put((layer_idx, e), None)
    return len(counts) - len(new), len(plan)


def test_what_is_asked_more_is_kept():
    """Of two layers with room for a fourth of their experts, those stay that decoding asks most; in
    the end nothing is copied any more.
    """
    shares = ExpertShares({0: 16, 1: 16})
    tier = ExpertTier(shares)
    tier.resize(8)
    copied = []
    for token in range(400):
        often = [0, 1, 2, 3]
        rarely = [4 + (5 * token + k) % 12 for k in (0, 3)]
        found = [run(tier, shares, i, dict.fromkeys([*often, *rarely], 1)) for i in (0, 1)]
        copied.append(sum(count for _, count in found))
    assert {expert for expert in itertools.product((0, 1), range(16)) if expert in tier} == set(
        itertools.product((0, 1), range(4))
    )
    assert sum(copied[100:]) == 0


def test_a_long_prompt_does_not_flush():
    """A prompt that asks every expert once, as often as decoding did, changes nothing; one that
    asks others more brings those in.
    """
    shares = ExpertShares({0: 16, 1: 16})
    tier = ExpertTier(shares)
    tier.resize(8)
    hot = {e: 100 if e < 4 else 20 for e in range(16)}
    for _ in range(2):
        for i in (0, 1):
            run(tier, shares, i, hot)
    before = {expert for expert in itertools.product((0, 1), range(16)) if expert in tier}
    assert {e for _, e in before} == {0, 1, 2, 3}
    for i in (0, 1):
        assert run(tier, shares, i, hot) == (4, 0)
    cold = {e: 100 if e >= 12 else 20 for e in range(16)}
    for _ in range(2):
        for i in (0, 1):
            run(tier, shares, i, cold)
    after = {e for i, e in itertools.product((0, 1), range(16)) if (i, e) in tier}
    assert after == {12, 13, 14, 15}
