"""How much of a prompt is read beside others: what its weights' reading hides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm_core.serving.token_budget import LEAST, MOST, TokenBudget


class Machine:
    """What passes take where computing and reading run side by side."""

    def __init__(self, token_seconds: float, read_seconds: float, pass_seconds: float = 0.0):
        self._each, self._read, self._least = token_seconds, read_seconds, pass_seconds

    def run(self, budget: TokenBudget, num_tokens: int) -> None:
        """A pass over so many tokens."""
        computing = self._least + num_tokens * self._each
        seconds = max(computing, self._read)
        budget.measured(num_tokens, seconds, self._read, seconds - computing)


@pytest.mark.parametrize("first", [LEAST, 4000])
def test_as_many_as_are_computed_while_weights_are_read(first):
    """1,000 tokens a second, and weights that take 2.05 seconds: 2,048 tokens, whether the first
    pass was over too few or over too many.
    """
    budget, machine = TokenBudget(), Machine(0.001, 2.05)
    assert budget.tokens == LEAST
    machine.run(budget, 1)
    assert budget.tokens == LEAST  # one token says nothing
    machine.run(budget, first)
    for grown in (512, 1024, 2048, 2048):
        assert budget.tokens == (grown if first == LEAST else 2048)
        machine.run(budget, budget.tokens)


def test_weights_in_memory_hide_nothing():
    """The least there is."""
    budget = TokenBudget()
    Machine(0.001, 0.0).run(budget, 4000)
    assert budget.tokens == LEAST


def test_what_is_loaded_to_stay_is_no_computing():
    """The first pass loads resident weights, which is neither reading for it nor computing."""
    budget = TokenBudget()
    budget.measured(256, 9.0, 8.5, 8.5)
    budget.measured(256, 2.0, 2.0, 1.5)
    assert budget.tokens == 512
    budget.measured(512, 2.0, 2.0, 1.0)
    assert budget.tokens == 1024


def test_tokens_after_many_others_take_longer():
    """Attention over a long past: parts become smaller with it at once, and larger when that is
    over.
    """
    budget = TokenBudget()
    Machine(0.001, 2.05).run(budget, 1024)
    assert budget.tokens == 2048
    Machine(0.002, 2.05).run(budget, 2048)
    assert budget.tokens == 1024
    for _ in range(4):
        Machine(0.001, 2.05).run(budget, 1024)
    assert budget.tokens == 2048


def test_a_device_that_computes_beside_the_host_is_found_out():
    """There the host waits for the device and takes that for the disk: passes grow, but never to
    more than about twice their reading.
    """
    budget, num_tokens, times = TokenBudget(), LEAST, []
    for _ in range(20):
        seconds = max(2.0, num_tokens * 0.002)
        budget.measured(num_tokens, seconds, 2.0, seconds)
        times.append(seconds)
        num_tokens = budget.tokens
    assert max(times[-10:]) <= 2 * 2.0 + 0.2


@given(st.floats(1e-5, 1.0), st.floats(0.01, 100.0))
def test_it_finds_what_reading_hides(token_seconds, read_seconds):
    """Passes of its own size lead to it on any machine, whatever waits for the disk meanwhile."""
    budget, machine = TokenBudget(), Machine(token_seconds, read_seconds)
    for _ in range(8):
        machine.run(budget, 1)
        machine.run(budget, budget.tokens)
    hidden = max(LEAST, min(read_seconds / token_seconds, MOST))
    assert hidden - 65 <= budget.tokens <= hidden + 1


@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e4)),
        max_size=12,
    )
)
def test_it_is_always_a_part_of_a_prompt(passes):
    """Whatever was measured: a multiple of 64 between the least and the most."""
    budget = TokenBudget()
    for one in passes:
        budget.measured(*one)
    assert LEAST <= budget.tokens <= MOST
    assert budget.tokens % 64 == 0
