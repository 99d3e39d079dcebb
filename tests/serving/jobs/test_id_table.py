"""Marks on many names in little memory."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ollm_core.serving.jobs.id_table import IdTable


@given(st.lists(st.tuples(st.text(max_size=3), st.sampled_from([1, 2, 4, 128]))))
def test_it_is_a_dictionary(marks):
    """Whatever names are marked, in whatever order."""
    table, expected = IdTable(), {}
    for name, bit in marks:
        assert table.mark(name, bit) == expected.get(name, 0)
        expected[name] = expected.get(name, 0) | bit
        assert table.marks(name) == expected[name]
    assert len(table) == len(expected)
    assert table.marks("none of them") == 0


def test_a_name_takes_a_few_dozen_bytes():
    """Of however many, and however long; all are found again."""
    table, chance = IdTable(), random.Random(0)
    names = [f"{chance.random()}{'long' * 50}" for _ in range(20_000)]
    for name in names:
        assert table.mark(name, 1) == 0
    assert table.num_bytes <= 52 * len(names)
    assert all(table.marks(name) == 1 for name in names)
