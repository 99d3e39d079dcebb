"""Reading engines of the operating system: past the page cache, and through a memory map."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weight_units import unit_of

from ollm_conformance import ByteSourceConformance
from ollm_core import InputError, ReadError
from ollm_core.checkpoint.safetensors import open_checkpoint
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


def test_beside_others_a_run_is_read_in_parts(tmp_path, monkeypatch):
    """The same bytes, in calls of at most 16 MiB while somebody else waits for the disk."""
    values = torch.randint(0, 256, (37 << 20,), dtype=torch.uint8)
    save_file({"large": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tensors = unit_of(open_checkpoint(tmp_path), "large").tensors
    sizes, real = [], os.preadv

    def preadv(file, buffers, offset):
        sizes.append(len(buffers[0]))
        return real(file, buffers, offset)

    with DirectSource([tmp_path / "model.safetensors"]) as source:
        monkeypatch.setattr(os, "preadv", preadv)
        for with_others, num_calls in ((False, 1), (True, 3), (False, 1)):
            source.take_turns(with_others)
            sizes.clear()
            buffer = aligned_buffer(source.buffer_bytes(tensors))
            [offset] = source.read(tensors, as_memoryview(buffer))
            assert torch.equal(buffer[offset : offset + len(values)], values)
            assert len(sizes) == num_calls
            assert not with_others or max(sizes) == 16 << 20


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
