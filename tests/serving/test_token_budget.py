"""How much of a prompt is read beside others: what its weights' reading hides."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ollm_core.serving.token_budget import LEAST, MOST, TokenBudget


def test_as_many_as_are_computed_while_weights_are_read():
    """1,000 tokens a second, and weights that take 2.05 seconds: 2,048 tokens."""
    budget = TokenBudget()
    assert budget.tokens == LEAST
    budget.measured(1, 2.1, 2.05)
    budget.measured(4000, 4.0, 2.05)
    assert budget.tokens == 2048


def test_weights_in_memory_hide_nothing():
    """The least there is."""
    budget = TokenBudget()
    budget.measured(4000, 4.0, 0.0)
    assert budget.tokens == LEAST


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e4), st.floats(0, 1e4)), max_size=12)
)
def test_it_is_always_a_part_of_a_prompt(passes):
    """Whatever was measured: a multiple of 64 between the least and the most."""
    budget = TokenBudget()
    for one in passes:
        budget.measured(*one)
    assert LEAST <= budget.tokens <= MOST
    assert budget.tokens % 64 == 0
