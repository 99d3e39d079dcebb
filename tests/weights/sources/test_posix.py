"""Reading engines of the operating system: past the page cache, and through a memory map."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import save_file
from weight_units import unit_of

from ollm_conformance import ByteSourceConformance
from ollm_core import InputError, ReadError
from ollm_core.device.buffers import aligned_buffer, as_memoryview
from ollm_core.weights.sources.posix import DirectSource, MmapSource, open_source


class TestDirectSource(ByteSourceConformance):
    """Reading past the page cache."""

    @classmethod
    def open_source(cls, paths):
        return DirectSource(paths)


class TestMmapSource(ByteSourceConformance):
    """Reading through a memory map."""

    over_2gib = False

    @classmethod
    def open_source(cls, paths):
        return MmapSource(paths)


def test_a_file_that_shrank_names_its_end(saved):
    """A file cut short under an open model gives a ReadError that says where it ends."""
    _, checkpoint = saved
    path = next(iter(checkpoint.files))
    unit = unit_of(checkpoint, "t8")
    for engine in (DirectSource, MmapSource):
        with engine([path]) as source:
            os.truncate(path, unit.tensors[0].offset + 100)
            buffer = aligned_buffer(source.buffer_bytes(unit.tensors))
            with pytest.raises(ReadError, match=r"model\.safetensors: ends at byte"):
                source.read(unit.tensors, as_memoryview(buffer))


def test_mmap_where_direct_is_refused(saved):
    """A file system without O_DIRECT gets the memory map, or one line if direct was insisted on."""
    tensors, _ = saved
    memory = Path("/dev/shm") / f"ollm-test-{os.getpid()}"
    memory.mkdir()
    try:
        save_file(tensors, memory / "model.safetensors")
        try:
            DirectSource([memory / "model.safetensors"]).close()
        except OSError:
            with open_source([memory / "model.safetensors"]) as source:
                assert source.name == "mmap"
            with pytest.raises(InputError, match="O_DIRECT"):
                open_source([memory / "model.safetensors"], "direct")
    finally:
        (memory / "model.safetensors").unlink()
        memory.rmdir()
    with pytest.raises(InputError, match="unknown reading engine"):
        open_source([], "fast")
