"""Weights that a device with memory of its own keeps: their way there, on a simulated one that does
things in any order that it may.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_bus import SimulatedBus

from ollm_core import ReadError
from ollm_core.contracts.tensors import ParameterSource, TensorInfo
from ollm_core.device.buffers import PAGE
from ollm_core.weights import device_load
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.units import Parameter, WeightUnit

FILE_BYTES = 40 * PAGE


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A file of random bytes, and these."""
    path = tmp_path_factory.mktemp("stored") / "weights"
    content = random.Random(0).randbytes(FILE_BYTES)
    path.write_bytes(content)
    return path, torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unit_of(path, places):
    """A unit of tensors that are so many bytes at such an offset each."""
    infos = [
        TensorInfo(f"t{i}", "U8", (size,), path, offset, size)
        for i, (offset, size) in enumerate(places)
    ]
    return WeightUnit(
        "unit",
        tuple(Parameter(t.name, t.shape, ParameterSource((t.name,)), (t,)) for t in infos),
    )


class Fails:
    """A reading engine that fails at its n-th read."""

    def __init__(self, source, at):
        self._source, self.left = source, at

    def read(self, tensors, buffer):
        self.left -= 1
        if self.left == 0:
            raise ReadError("not this time")
        return self._source.read(tensors, buffer)


@settings(max_examples=100, deadline=None)
@given(
    places=st.lists(
        st.tuples(st.integers(0, FILE_BYTES // 2), st.integers(1, FILE_BYTES // 2)), min_size=1
    ),
    piece_pages=st.integers(1, 4),
    seed=st.integers(0, 1 << 32),
    fails_at=st.integers(1, 20),
)
def test_every_byte_comes_through_little_memory(stored, places, piece_pages, seed, fails_at):
    """Wherever tensors begin and end, whatever the device does first, and after a read that failed:
    the device has the file's bytes, and the host no more memory than was said.
    """
    path, content = stored
    unit = unit_of(path, places)
    bus = SimulatedBus(seed, queued=True, refuses=seed % 5 == 0)
    with pytest.MonkeyPatch.context() as patch, open_source([path]) as source:
        patch.setattr(device_load, "_PIECE_BYTES", piece_pages * PAGE)
        num_bytes = device_load.staging_bytes([unit], source)
        assert num_bytes <= 2 * piece_pages * PAGE
        for engine in (Fails(source, fails_at), source):
            with device_load.DeviceLoader(engine, bus, num_bytes) as stage:
                try:
                    found, begins = stage.read(unit)
                except ReadError:
                    assert engine is not source
                    continue
                assert sum(bus.locked.values()) in (0, num_bytes)
                seen = []
                bus.compute(lambda found=found, seen=seen: seen.append(found.clone()))
                bus.finish()
                for (offset, size), begin in zip(places, begins, strict=True):
                    assert torch.equal(
                        seen[0][begin : begin + size], content[offset : offset + size]
                    )
                assert found.nbytes == unit.packed_bytes
        del stage, found
    bus.finish()
    assert not bus.locked
    assert not bus.faults


def test_pieces_are_of_some_megabytes(stored):
    """However large a tensor is, and wherever in a page it begins."""
    path, _ = stored
    [tensor] = unit_of(path, [(5, 100)]).tensors
    large = replace(tensor, num_bytes=(100 << 20) + 3)
    pieces = list(device_load._pieces(large))
    assert sum(piece.num_bytes for piece in pieces) == large.num_bytes
    assert len(pieces) == 13
    assert all(piece.offset % PAGE == 0 for piece in pieces[1:])
