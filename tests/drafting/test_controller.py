"""The gate on a simulated clock: it never costs more than it may, and finds what pays."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_core.drafting.controller import DraftLengthController, FixedLength, draft_length

LONGEST = 10
SECONDS = st.floats(0.001, 10)


class Text:
    """One text on a simulated clock: passes of given costs, drafts of given worth."""

    def __init__(self, gate, costs, asking=lambda n: 0.0, prompt=0.0, busy=lambda: 1.0):
        """`costs[k]` is the seconds of a pass with k drafted tokens, `asking(n)` what the draft
        source takes when it is asked for n, `busy()` how often longer the machine takes.
        """
        self.busy, self.after = busy, 0.0
        self.gate, self.costs, self.asking = gate, costs, asking
        self.prompt, self.seconds, self.tokens = prompt, 0.0, 0
        self.first_question, self.lengths = 0.0, []
        gate.started(prompt)

    def one_pass(self, num_given, num_right):
        """The source would give `num_given`, of which the first `num_right` are right."""
        checked = 0
        if asked := self.gate.ask(LONGEST):
            assert asked <= LONGEST
            took = self.asking(asked)
            self.first_question = self.first_question or took
            given_now = min(asked, num_given)
            checked = self.gate.answered(asked, given_now, took)
            assert checked <= given_now
            self.seconds += took
        right = min(checked, num_right)
        took = self.costs[checked] * self.busy()
        if self.lengths and self.lengths[-1] and not checked:
            took += self.after  # what comes back after a draft
        self.gate.checked(checked, right, took)
        self.seconds += took
        self.tokens += right + 1
        self.lengths.append(checked)

    def run(self, num_passes, chances, seed=0):
        """Position i of a draft is right with `chances[i]`."""
        draw = random.Random(seed)
        for _ in range(num_passes):
            right = 0
            while right < LONGEST and draw.random() < chances[right]:
                right += 1
            self.one_pass(LONGEST, right)
        return self

    @property
    def rate(self):
        """Tokens per second."""
        return self.tokens / self.seconds


@st.composite
def cost_curves(draw):
    """Seconds of a pass by drafted tokens; each adds at most what a pass of its own takes."""
    costs = [draw(SECONDS)]
    for share in draw(st.lists(st.floats(0, 1), min_size=LONGEST, max_size=LONGEST)):
        costs.append(costs[-1] + share * costs[0])
    return costs


@settings(max_examples=80, deadline=None)
@given(
    costs=cost_curves(),
    question=st.floats(0, 5),
    each=st.floats(0, 2),
    prompt=st.floats(0, 300),
    after=st.floats(0, 1),
    drafts=st.lists(st.tuples(st.integers(0, LONGEST), st.integers(0, LONGEST)), max_size=200),
)
def test_never_more_than_a_twentieth(costs, question, each, prompt, after, drafts):
    """Whatever passes and drafts cost and however drafts turn out, at every moment the text took at
    most 5% longer than without drafts: 5% of the prompt, at most one pass, included; what the very
    first question took, and what a draft did to the pass after it, once, come on top.
    """
    text = Text(DraftLengthController(LONGEST), costs, lambda n: question + n * each, prompt)
    text.after = after * costs[0]
    for num_given, num_right in drafts:
        text.one_pass(num_given, min(num_given, num_right))
        plain = text.tokens * costs[0]
        allowed = 1.05 * plain + min(0.05 * prompt, costs[0]) + text.first_question + text.after
        assert text.seconds <= allowed * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(costs=cost_curves(), num_good=st.integers(1, 120), seed=st.integers(0, 9))
def test_never_more_when_drafts_turn_bad(costs, num_good, seed):
    """Drafts that were right and then are not: the same bound."""
    text = Text(DraftLengthController(LONGEST), costs)
    text.run(num_good, [1.0] * LONGEST).run(100, [0.0] * LONGEST)
    assert text.seconds <= 1.05 * text.tokens * costs[0] * (1 + 1e-9)


def best_fixed(costs, chances):
    """The most tokens per second of any fixed length, by arithmetic."""
    rates, tokens, chance = [1 / costs[0]], 1.0, 1.0
    for length in range(1, LONGEST + 1):
        chance *= chances[length - 1]
        tokens += chance
        rates.append(tokens / costs[length])
    return max(rates), rates.index(max(rates))


SHAPES = {
    "weights are all": [1 + 0.01 * k for k in range(LONGEST + 1)],
    "each token costs": [1 + 0.3 * k for k in range(LONGEST + 1)],
    "more experts": [1 + 2 * (1 - 0.8**k) for k in range(LONGEST + 1)],
    "one by one": [0.2 + 0.8 * (k + 1) for k in range(LONGEST + 1)],
}


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.85, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_finds_what_pays(shape, chance):
    """After a while it is within 15% of the best fixed length, whatever makes passes dear; where
    that is none, within the 5% that it may lose.
    """
    costs, chances = SHAPES[shape], [chance] * LONGEST
    text = Text(DraftLengthController(LONGEST), costs, prompt=30.0).run(500, chances)
    best, length = best_fixed(costs, chances)
    assert text.rate > best * (0.85 if length else 0.95)


def test_gives_up_and_comes_back():
    """Where drafts stop being right it stops, and begins again when they are."""
    costs = [1 + 0.5 * k for k in range(LONGEST + 1)]
    text = Text(DraftLengthController(LONGEST), costs, prompt=30.0)
    text.run(60, [1.0] * LONGEST)
    assert max(text.lengths) == LONGEST
    text.run(300, [0.0] * LONGEST)
    assert sum(length > 0 for length in text.lengths[-200:]) < 20
    text.run(200, [1.0] * LONGEST)
    assert text.lengths[-30:].count(LONGEST) > 20


def test_a_slow_source_is_not_asked():
    """A draft source that takes as long as its drafts save is left alone, right as they are."""
    costs = SHAPES["weights are all"]
    slow = Text(DraftLengthController(LONGEST), costs, lambda n: 1.5 * n, prompt=30.0).run(
        400, [1.0] * LONGEST
    )
    assert sum(length > 0 for length in slow.lengths) < 40
    quick = Text(DraftLengthController(LONGEST), costs, lambda n: 0.1 * n, prompt=30.0)
    assert quick.run(400, [1.0] * LONGEST).rate > 3


def test_a_source_that_never_answers():
    """It is asked for as long as that costs nothing, and the text goes on."""
    text = Text(DraftLengthController(LONGEST), SHAPES["weights are all"], lambda n: 0.001)
    for _ in range(5000):
        text.one_pass(0, 0)
    assert text.seconds <= 1.05 * text.tokens + 0.001


def test_a_first_slow_pass_misleads_nobody():
    """A length whose first pass was slow, for what happens but once, is tried again."""
    costs = SHAPES["weights are all"]
    text = Text(DraftLengthController(LONGEST), costs, prompt=30.0)
    for length in range(1, LONGEST + 1):
        text.gate._passes.add(length, 3.0)
    text.run(500, [1.0] * LONGEST)
    assert text.rate > 5


@pytest.mark.parametrize("shape", ["weights are all", "each token costs"])
def test_a_busy_machine_misleads_seldom(shape):
    """Where every fourth pass takes up to six times as long, right drafts still bring most of the
    tokens that they would, over many texts.
    """
    draw, costs, num_tokens = random.Random(0), SHAPES[shape], []
    for _ in range(20):
        gate = DraftLengthController(LONGEST)
        busy = Text(
            gate, costs, prompt=30.0, busy=lambda: max(1.0, draw.uniform(-14, 6))
        )  # a fourth of that is above 1
        num_tokens.append(busy.run(60, [1.0] * LONGEST).tokens)
    quiet = Text(DraftLengthController(LONGEST), costs, prompt=30.0).run(60, [1.0] * LONGEST)
    assert statistics.mean(num_tokens) > 0.8 * quiet.tokens


def test_a_fixed_length_is_fixed():
    """It is asked for as long as there is room, and all that is given is checked."""
    gate = FixedLength(4)
    gate.started(1.0)
    for _ in range(5):
        assert (gate.ask(9), gate.ask(3), gate.answered(4, 4, 99.0)) == (4, 3, 4)
        gate.checked(4, 0, 99.0)


def test_what_decides():
    """The gate, but for a number that is given, and for sampling: a seed knows no clock."""
    assert isinstance(draft_length(10, None, sampling=False), DraftLengthController)
    assert draft_length(10, 4, sampling=False).ask(9) == 4
    assert draft_length(10, 4, sampling=True).ask(9) == 4
    assert [draft_length(10, None, sampling=True).ask(n) for n in (9, 99)] == [9, 10]
