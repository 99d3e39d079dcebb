"""The limit of CUDA's allocator: its arithmetic, and that it is taken back. That torch keeps it is
for tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.cuda_limit import AllocatorCap

GPU = torch.device("cuda:0")
TOTAL = 24 << 30


class Memory:
    """A device of 24 GiB on which `allocated` bytes are tensors of this process."""

    def __init__(self, allocated=0, fraction=1.0):
        self.allocated = allocated
        self.fraction = fraction

    def mem_get_info(self, device):
        return TOTAL - self.allocated, TOTAL

    def memory_allocated(self, device):
        return self.allocated

    def get_per_process_memory_fraction(self, device):
        return self.fraction

    def set_per_process_memory_fraction(self, fraction, device):
        assert 0 <= fraction <= 1
        self.fraction = fraction

    @property
    def allowed(self):
        return round(self.fraction * TOTAL)


def cap(memory, gib):
    """That of a model with a budget of `gib`."""
    return AllocatorCap(MemoryAccount("device memory", gib << 30), GPU, memory)


def test_the_budget_is_the_limit_and_is_taken_back():
    """A sixteenth and a workspace above it, also when the pass fails."""
    memory = Memory()
    limit = cap(memory, 8)

    def failing_pass():
        with limit():
            assert 8 << 30 < memory.allowed <= 9 << 30
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_pass()
    assert memory.fraction == 1.0


def test_others_keep_what_they_hold():
    """Tensors from before the model, and those that came since, are not taken from its budget; its
    own are not counted twice.
    """
    memory = Memory(allocated=5 << 30)
    account = MemoryAccount("device memory", 8 << 30)
    limit = AllocatorCap(account, GPU, memory)
    with limit():
        at_first = memory.allowed
    assert 13 << 30 < at_first <= 14 << 30
    account.reserve("resident weights", 6 << 30)
    memory.allocated += 6 << 30
    with limit():
        assert memory.allowed == at_first
    memory.allocated += 3 << 30
    with limit():
        assert memory.allowed == at_first + (3 << 30)


def test_no_more_than_there_is():
    """A budget of all of it, or more, is no limit."""
    memory = Memory()
    with cap(memory, 40)():
        assert memory.fraction == 1.0


def test_passes_of_two_models():
    """Both budgets are allowed, in whatever order the passes end; then there is no limit."""
    for first_out in (0, 1):
        memory = Memory()
        passes = [cap(memory, 4)(), cap(memory, 6)()]
        for one in passes:
            one.__enter__()
        assert 10 << 30 < memory.allowed <= 11 << 30
        for one in (passes[first_out], passes[1 - first_out]):
            one.__exit__(None, None, None)
        assert memory.fraction == 1.0


def test_a_limit_of_the_user_is_put_back():
    """It is raised by the budget for a pass."""
    memory = Memory(fraction=0.25)
    with cap(memory, 4)():
        assert 10 << 30 < memory.allowed <= 11 << 30
    assert memory.fraction == 0.25
