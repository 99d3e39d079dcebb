"""Sizes as people write them, and an account whose limit holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ollm_core import DoesNotFitError
from ollm_core.device.buffers import HUGE_PAGE, PAGE, aligned_buffer, as_memoryview, round_up
from ollm_core.memory.accounts import MemoryAccount


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60)), max_size=40))
def test_account_never_passes_its_limit(steps):
    """Whatever is taken and given back, used is the sum of kinds and at most the limit."""
    account = MemoryAccount("device memory", 100)
    held: list[tuple[str, int]] = []
    for kind, num_bytes in steps:
        try:
            account.reserve(kind, num_bytes)
        except DoesNotFitError:
            assert account.used + num_bytes > 100
            if held:
                account.release(*held.pop())
        else:
            held.append((kind, num_bytes))
        assert account.used == sum(account.kinds.values()) == sum(n for _, n in held) <= 100
        assert account.used <= account.peak <= 100


@pytest.mark.parametrize("num_bytes", [1, PAGE, PAGE + 1, HUGE_PAGE + 5, 3 * HUGE_PAGE])
def test_aligned_buffer(num_bytes):
    """It has the size asked, starts at a page (a huge one if that large), and can be written."""
    buffer = aligned_buffer(num_bytes)
    assert buffer.numel() == num_bytes
    assert buffer.data_ptr() % (HUGE_PAGE if num_bytes >= HUGE_PAGE else PAGE) == 0
    as_memoryview(buffer)[-1] = 7
    assert buffer[-1] == 7
    assert buffer.sum(dtype=torch.int64) == 7
    assert round_up(num_bytes) % PAGE == 0
