"""The ring that reads ahead."""

from __future__ import annotations

import threading

import pytest
import torch
from weight_units import unit_of

from ollm_core import ReadError
from ollm_core.weights.prefetch import Ring
from ollm_core.weights.sources.posix import DirectSource


def test_ring_resumes_after_an_error(saved):
    """A failed read reaches whoever waits for it, and the same unit can be asked again."""
    tensors, checkpoint = saved
    units = [unit_of(checkpoint, f"t{i}") for i in range(4)]
    fail = threading.Event()

    class Flaky(DirectSource):
        def read(self, wanted, buffer):
            if wanted[0].name == "t2" and not fail.is_set():
                fail.set()
                raise ReadError("once")
            return super().read(wanted, buffer)

    size = 4 * 4096 + max(unit.file_bytes for unit in units)
    with Flaky(list(checkpoint.files)) as source, Ring(units, source, 2, size) as ring:
        ring.set_order(range(4))
        for i in (0, 1):
            ring.give_back(ring.take(i))
        with pytest.raises(ReadError, match="once"):
            ring.take(2)
        for i in (2, 3, 0, 1):
            slot = ring.take(i)
            (value,) = units[i].build(slot.buffer, slot.offsets, torch.float32)
            assert torch.equal(value, tensors[f"t{i}"])
            ring.give_back(slot)
