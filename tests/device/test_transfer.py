"""What is asked of CUDA, in which order. That CUDA does it is for tests/gpu."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from ollm_core.device.buffers import HUGE_PAGE, PAGE, aligned_buffer
from ollm_core.device.memory import SHARED, OwnMemory, memory_of
from ollm_core.device.transfer import CudaBus
from ollm_core.memory.pair import PerMemory

CPU = torch.device("cpu")


class Cuda:
    """Writes down what it is asked. Its tensors are the CPU's."""

    def __init__(self, error=0):
        self.asked = []
        self.registered = {}
        self._error = error

    def Stream(self, device):
        done = SimpleNamespace(synchronize=lambda: self.asked.append("waited"))
        return SimpleNamespace(record_event=lambda event=None: done)

    def stream(self, stream):
        return contextlib.nullcontext()

    def Event(self, *, enable_timing, blocking):
        assert blocking

    def device(self, device):
        return contextlib.nullcontext()

    def cudart(self):
        def register(address, num_bytes, flags):
            assert address % PAGE == num_bytes % PAGE == 0
            assert flags == 1
            if not self._error:
                self.registered[address] = num_bytes
            return self._error

        def unregister(address):
            self.asked.append("unregistered")
            del self.registered[address]

        return SimpleNamespace(
            cudaHostRegister=register,
            cudaHostUnregister=unregister,
            cudaError=SimpleNamespace(success=0),
            cudaGetErrorString={2: "out of memory"}.get,
        )


@pytest.mark.parametrize("num_bytes", [1, PAGE + 1, HUGE_PAGE + 1])
def test_whole_pages_are_locked_until_the_memory_goes(num_bytes):
    """And no more than these: no size is rounded up to a power of two. Views keep it locked."""
    cuda = Cuda()
    buffer = CudaBus(CPU, cuda).host_buffer(num_bytes)
    assert buffer.nbytes == num_bytes
    assert cuda.registered == {buffer.data_ptr(): -(-num_bytes // PAGE) * PAGE}
    view = buffer[:1]
    del buffer
    view.fill_(7)
    assert cuda.registered
    assert not cuda.asked
    del view
    assert not cuda.registered
    assert cuda.asked == ["waited", "unregistered"]


def test_memory_that_cuda_does_not_lock(caplog):
    """It is there all the same, is not unlocked, and is told of once."""
    cuda = Cuda(error=2)
    bus = CudaBus(CPU, cuda)
    for _ in range(2):
        OwnMemory(bus).host_tensor((3, 5), torch.float16).fill_(1)
    assert cuda.asked == []
    (record,) = caplog.records
    assert record.message.endswith("copies take longer: out of memory")


def test_a_large_copy_goes_in_parts():
    """Every byte of it, also where the last part is a short one."""
    bus = CudaBus(CPU, Cuda())
    source = torch.randint(0, 256, ((64 << 20) + 3,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    bus.copy(target, source)
    assert torch.equal(target, source)
    assert bus.beside().copying is not bus.copying is bus.copying


def test_a_cpu_computes_in_the_memory_of_the_host():
    """So does a device without data; a GPU that is not here is asked for nothing yet."""
    assert not memory_of(CPU).is_own
    assert not memory_of(torch.device("meta")).is_own
    cuda = memory_of(torch.device("cuda:3"))
    assert isinstance(cuda, OwnMemory)
    assert isinstance(cuda.bus, CudaBus)
    assert cuda.bus.device.index == 3


def test_what_is_read_counts_on_one_side():
    """On the host's where the device has memory of its own, else on the device's; tensors for
    transfers take whole pages.
    """
    own, pair = OwnMemory(CudaBus(CPU, Cuda())), PerMemory(1, 2)
    assert (SHARED.read_side(pair), own.read_side(pair)) == (1, 2)
    assert (SHARED.reads(5), own.reads(5)) == (PerMemory(5, 0), PerMemory(0, 5))
    assert (SHARED.host_bytes(5), own.host_bytes(5)) == (5, PAGE)
    assert SHARED.copied() is None
    assert SHARED.beside() is SHARED


def test_a_lock_that_fails_leaves_nothing():
    """An error in it is not hidden, and the map goes without being unlocked."""

    def fail(address, num_bytes):
        raise RuntimeError("no driver")

    with pytest.raises(RuntimeError, match="no driver"):
        aligned_buffer(10, fail)
