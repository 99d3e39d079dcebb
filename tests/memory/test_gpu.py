"""The GPU's memory without torch: NVIDIA's library as it is, or a stand-in of its C interface."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ollm_core.memory import gpu


class Library:
    """What NVIDIA's library does, for `count` GPUs."""

    def __init__(self, count: int = 1, broken: bool = False) -> None:
        self.count, self.broken, self.open = count, broken, 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 9 if self.broken else 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, _: object) -> int:
        return 0 if index < self.count else 2

    def nvmlDeviceGetMemoryInfo(self, _: object, found: object) -> int:
        memory = ctypes.cast(found, ctypes.POINTER(gpu._Memory)).contents
        memory.total, memory.free = 8 * 10**9, 7 * 10**9
        return 0


@pytest.mark.parametrize(
    ("setting", "index"),
    [(None, 0), ("", None), ("-1", None), ("2,0", 2), ("GPU-1f", 0), ("none", None)],
)
def test_visible_devices(setting, index):
    """As CUDA_VISIBLE_DEVICES says, or none."""
    assert gpu._first_visible(setting) == index


def test_memory_is_asked_for_and_the_library_is_left():
    """Free before all; nothing for a GPU that is not there, or a driver that does not work."""
    library = Library()
    assert gpu._memory(library, 0) == (7 * 10**9, 8 * 10**9)
    assert gpu._memory(library, 1) is None
    assert library.open == 0
    assert gpu._memory(Library(broken=True), 0) is None


def test_as_torch_sees_it():
    """A GPU is told of exactly where torch has one."""
    found = gpu.first_gpu()
    assert (found is not None) == torch.cuda.is_available()
    if found is not None:
        assert found[1] == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.05)
