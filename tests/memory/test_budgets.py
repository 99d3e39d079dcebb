"""What a model may use of each memory, and budgets that nothing could keep."""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core import DoesNotFitError, InputError
from ollm_core.memory.budgets import RESERVE_BYTES, Budgets, default_budgets, stated_budgets
from ollm_core.memory.host import HostMemory

CPU = torch.device("cpu")


def test_defaults_are_part_of_what_is_free():
    """On a CPU, nine tenths of it together, a reserve apart; others may come and go meanwhile."""
    free = HostMemory().free()
    found = default_budgets(CPU)
    assert 0 < found.host < found.device
    assert found.device + found.host <= max(free - RESERVE_BYTES, 10) * 1.3


def test_what_is_stated_counts():
    """One of them may be left to the default."""
    assert stated_budgets(CPU, "2GB", 10**6) == Budgets(2 * 10**9, 10**6)
    assert stated_budgets(CPU, None, "1MiB").host == 1 << 20


def test_a_gpu_that_is_not_here_is_assumed():
    """For plans: 8 GB."""
    if not torch.cuda.is_available():
        assert default_budgets(torch.device("cuda:0")).device == 8 * 10**9


def test_more_than_there_is_is_refused(tiny):
    """With what is there and what would do; more than is free is not, nor is a plan."""
    there = HostMemory().total()
    most = r"^device_memory: the limit is 1000000 TB, the machine has "
    with pytest.raises(DoesNotFitError, match=most):
        stated_budgets(CPU, 10**18, None)
    with pytest.raises(DoesNotFitError, match=r"^host_memory: "):
        stated_budgets(CPU, None, there + 1)
    with pytest.raises(DoesNotFitError, match=r"^device_memory and host_memory together: "):
        stated_budgets(CPU, there * 2 // 3, there * 2 // 3)
    assert stated_budgets(CPU, there, None).device == there
    assert stated_budgets(CPU, 10**18, None, must_be_there=False).device == 10**18
    with pytest.raises(
        DoesNotFitError, match=r"hint: set a lower limit; the defaults are now .*B device"
    ):
        ollm.load(tiny, device="cpu", device_memory="900TB")


@pytest.mark.parametrize("size", ["8", "-1GB", "0GB", "8 GBs", "GB", "1e9B", -5, 0])
def test_what_is_no_size_is_refused(tiny, size):
    """One line that says how to write it."""
    with pytest.raises(InputError, match=r"is not a memory size. hint: .*as in 8GB"):
        ollm.load(tiny, device="cpu", device_memory=size)
