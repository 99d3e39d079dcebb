"""Locked memory and copies beside compute, on a CUDA device. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from ollm_core.device.transfer import CudaBus
from ollm_core.device.upload import Upload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZE = (48 << 20) + 1


@pytest.fixture
def bus():
    """That of the first device."""
    return CudaBus(torch.device("cuda:0"))


def test_our_maps_are_locked(bus):
    """Torch sees them as pinned; what goes can come again at the same address."""
    for _ in range(3):
        buffer = bus.host_buffer(SIZE)
        assert bus.locks
        assert buffer.is_pinned()
        del buffer


def test_a_refused_lock_harms_nothing_that_comes_after(bus):
    """Locking the same memory twice is an error; the next kernel does not get it."""
    buffer = bus.host_buffer(SIZE)
    assert bus.lock(buffer.data_ptr(), 4096)
    assert torch.ones(1000, device="cuda:0").sum().item() == 1000


@pytest.mark.parametrize("num_buffers", [1, 2])
def test_every_kernel_reads_what_it_asked_for(bus, num_buffers):
    """Host buffers are filled again when they were copied, the device's when they were used; the
    device's own times say that bytes moved.
    """
    upload = Upload(bus, SIZE, num_buffers, timed=True)
    hosts, copied, sums = [bus.host_buffer(SIZE) for _ in range(2)], [None, None], []
    work = torch.randn(2048, 2048, device="cuda:0")
    for value in range(20):
        if copied[value % 2] is not None:
            copied[value % 2].synchronize()
        hosts[value % 2].fill_(value)
        sent = upload.send(hosts[value % 2])
        copied[value % 2] = sent.copied
        content = upload.receive(sent)
        for _ in range(5):
            work = torch.tanh(work @ work)
        sums.append(content.sum(dtype=torch.int64))
        upload.release(sent)
    assert [int(found) for found in sums] == [value * SIZE for value in range(20)]
    torch.cuda.synchronize()
    assert upload.counters.num_bytes == 20 * SIZE
    assert upload.counters.waited_seconds >= 0
    assert upload.counters.copy_seconds > 0
    upload.close()
