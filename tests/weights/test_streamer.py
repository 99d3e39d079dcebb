"""Reading engines, the ring, and where units are kept."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ollm_conformance import ByteSourceConformance, WeightStreamerConformance
from ollm_core import DoesNotFitError, InputError, ParameterSource, ReadError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.device.buffers import aligned_buffer, as_memoryview
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.weights.embedding import EmbeddingRows
from ollm_core.weights.placement import spread_order
from ollm_core.weights.prefetch import Ring
from ollm_core.weights.sources.posix import DirectSource, MmapSource, open_source
from ollm_core.weights.streamer import TieredStreamer
from ollm_core.weights.units import Parameter, Units, WeightUnit

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    """Nine tensors of odd sizes in one file, and where they are."""
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(37 * (i + 1), 129) for i in range(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tensors, open_checkpoint(tmp_path)


def unit_of(checkpoint, *names):
    """A unit whose parameters are tensors as they are."""
    infos = [checkpoint.tensors[name] for name in names]
    return WeightUnit(
        "+".join(names),
        tuple(Parameter(t.name, t.shape, ParameterSource((t.name,)), (t,)) for t in infos),
    )


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


class TestTieredWeights(WeightStreamerConformance):
    """Some units resident, the rest through the ring."""

    reader = "direct"

    @classmethod
    def open_streamer(cls, units, files, dtype, account):
        source = open_source(files, cls.reader)
        accounts = PerMemory(account, MemoryAccount("host memory", 0))
        weights = TieredStreamer(units, source, dtype, CPU, accounts)
        try:
            weights.fit(account.limit - weights.fixed_device_bytes, 0)
        except BaseException:
            weights.close()
            raise
        return weights


class TestTieredWeightsMapped(TestTieredWeights):
    """The same through a memory map."""

    reader = "mmap"


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


def test_each_embedding_row_is_read_once(saved):
    """Repeated token ids cost one read."""
    tensors, checkpoint = saved
    with EmbeddingRows(checkpoint.tensors["t2"]) as rows:
        ids = torch.tensor([5, 0, 5, 110])
        assert torch.equal(rows.lookup(ids, torch.float32), tensors["t2"][ids])
        assert rows.bytes_read == 3 * 129 * 4


@given(num_units=st.integers(1, 200))
def test_spread_order_is_even(num_units):
    """It is a permutation, and any beginning of it leaves no gap over twice the even one."""
    order = spread_order(num_units)
    assert sorted(order) == list(range(num_units))
    for count in range(1, num_units + 1):
        kept = sorted(order[:count])
        gaps = [b - a for a, b in zip(kept, [*kept[1:], num_units], strict=True)]
        assert max(gaps) <= 2 * -(-num_units // count)


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


@settings(max_examples=15, deadline=None)
@given(
    budgets=st.lists(
        st.tuples(st.integers(0, 900_000), st.integers(0, 900_000)), min_size=1, max_size=4
    )
)
def test_fit_keeps_to_its_budget(tmp_path_factory, budgets):
    """Whatever budgets follow one another, every unit is right and no more is held than allowed.
    The placement is what is reserved, also where the account has refused part of it.
    """
    directory = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(101, 129 + i) for i in range(7)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(directory)
    cut = [unit_of(checkpoint, f"t{i}") for i in range(7)]
    units = Units(tuple(cut[:5]), (cut[5],), cut[6], checkpoint.tensors["t0"])
    account = MemoryAccount("device memory", 10**9)
    accounts = PerMemory(account, MemoryAccount("host memory", 0))
    source = open_source(list(checkpoint.files))
    with TieredStreamer(units, source, torch.float32, CPU, accounts) as weights:

        def held():
            return weights.held.bytes_of(weights.held.placement).device

        for budget, more in budgets:
            if budget < weights.least_bytes(budget):
                continue
            account.limit = account.used + more
            with suppress(DoesNotFitError):
                weights.fit(budget, 0)
            assert account.used - weights.fixed_device_bytes == held()
            account.limit = 10**9
            weights.fit(budget, 0)
            assert account.used - weights.fixed_device_bytes == held() <= budget
            for i in range(6):
                with weights.acquire(i) as (value,):
                    assert torch.equal(value, tensors[f"t{i}"])
