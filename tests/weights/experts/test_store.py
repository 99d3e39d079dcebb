"""Where experts are kept, how the others are read, and that budgets hold meanwhile."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from simulated_bus import CPU, SimulatedBus

from ollm_core import ParameterSource, ReadError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.device.memory import SHARED, OwnMemory
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.weights.experts.reader import GroupReader, cut_groups
from ollm_core.weights.experts.store import ExpertStore
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.units import Parameter, WeightUnit

NUM_EXPERTS = {1: 7, 2: 7, 4: 5}
SHAPE = 33, 130


def turned(tensor):
    """A transform that gives a view of what was read."""
    return tensor.t()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Experts of three layers, each of a tensor of its own, a row of one and a turned one."""
    directory = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    tensors = {f"{i}.rows": torch.randn(count, 65) for i, count in NUM_EXPERTS.items()}
    for i, count in NUM_EXPERTS.items():
        tensors |= {f"{i}.{e}.{n}": torch.randn(SHAPE) for e in range(count) for n in "ab"}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "x"}')
    infos = open_checkpoint(directory).tensors

    def unit(i, e):
        row = infos[f"{i}.rows"].row(e)
        whole, turn = infos[f"{i}.{e}.a"], infos[f"{i}.{e}.b"]
        return WeightUnit(
            f"{i} {e}",
            (
                Parameter("rows", row.shape, ParameterSource((row.name,), row=e), (row,)),
                Parameter("a", SHAPE, ParameterSource((whole.name,)), (whole,)),
                Parameter("b", SHAPE[::-1], ParameterSource((turn.name,), turned), (turn,)),
            ),
        )

    units = {i: [unit(i, e) for e in range(count)] for i, count in NUM_EXPERTS.items()}
    return tensors, units, directory / "model.safetensors"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), two_memories=st.booleans())
def test_right_experts_inside_any_budgets(stored, seed, two_memories):
    """Whatever is asked for under whatever budgets: the right slices in ascending order, no more
    held than allowed, and every expert either hit or read.
    """
    tensors, units, path = stored
    chosen = random.Random(seed)
    device, host = MemoryAccount("device memory", 10**9), MemoryAccount("host memory", 10**9)
    bus = SimulatedBus(seed) if two_memories else None
    memory = OwnMemory(bus) if bus else SHARED
    with (
        open_source([path]) as source,
        ExpertStore(
            units, source, torch.float32, CPU, PerMemory(device, host), memory=memory
        ) as store,
    ):
        for _ in range(chosen.randint(1, 4)):
            budgets = [chosen.randint(store.least_bytes, 1_300_000) for _ in range(2)]
            placement = store.place(*budgets)
            store.shrink(placement)
            assert device.used <= budgets[0]
            store.grow(placement)
            assert device.used <= budgets[0]
            assert host.used <= (budgets[1] if two_memories else 0)
            for i, count in NUM_EXPERTS.items():
                wanted = set(chosen.sample(range(count), chosen.randint(0, count)))
                seen = []
                with store.experts(i, wanted) as found:
                    for e, (row, whole, turn) in found:
                        seen.append(e)
                        assert torch.equal(row, tensors[f"{i}.rows"][e])
                        assert torch.equal(whole, tensors[f"{i}.{e}.a"])
                        assert torch.equal(turn, tensors[f"{i}.{e}.b"].t())
                assert seen == sorted(wanted)
                built = [value for kept in store._on_device._kept.values() for value in kept]
                assert sum(value.nbytes for value in built) <= placement.device_bytes
                packed = sum(bytes_.nbytes for bytes_, _ in store._on_host._kept.values())
                assert packed <= placement.host_bytes
                memory = source.buffer_bytes(units[i][0].tensors)  # what a view would keep
                assert all(value.untyped_storage().nbytes() < memory for value in built)
                assert not {*store._on_device._kept} & {*store._on_host._kept}
        counters = store.counters
        assert counters.routed == counters.hit + counters.read
        assert counters.kept_bytes <= counters.bytes_read
    assert device.used == host.used == 0
    if bus is not None:
        bus.finish()
        assert not bus.locked


@given(members=st.sets(st.integers(0, 6), min_size=1), num_bytes=st.integers(0, 500_000))
def test_groups_fit_their_buffer(stored, members, num_bytes):
    """Groups take their members in order, each once, and no more bytes than the buffer has."""
    _, units, path = stored
    with open_source([path]) as source:
        num_bytes += max(source.buffer_bytes(unit.tensors) for unit in units[1])
        groups = list(cut_groups(sorted(members), units[1], source, num_bytes))
    assert [e for group in groups for e in group.members] == sorted(members)
    assert all(group.members and group.num_bytes <= num_bytes for group in groups)


def test_a_group_is_read_while_the_one_before_is_used(stored):
    """The read of the second group starts before the first is done with, the third's does not."""
    _, units, path = stored
    with open_source([path], "mmap") as source:
        real, begun = source.read, []

        def read(tensors, buffer):
            begun.append(tensors[0].name)
            return real(tensors, buffer)

        source.read = read
        one = max(source.buffer_bytes(unit.tensors) for unit in units[1])
        groups = list(cut_groups([0, 3, 6], units[1], source, one))
        with GroupReader(source, one) as reader, reader.reading(groups) as filled:
            next(filled)
            reader._thread.submit(lambda: None).result()  # all that was asked for is done
            assert len(begun) == 2
            next(filled)
            reader._thread.submit(lambda: None).result()
            assert len(begun) == 3


def test_reading_left_early_or_closed(stored):
    """Leaving in the middle waits for the read under way; a closed reader says so."""
    _, units, path = stored
    with open_source([path]) as source:
        one = max(source.buffer_bytes(unit.tensors) for unit in units[1])
        groups = list(cut_groups([0, 3, 6], units[1], source, one))
        reader = GroupReader(source, one)
        with reader.reading(groups) as filled:
            next(filled)
        with reader.reading(groups) as filled:
            assert [one.group.members for one in filled] == [(0,), (3,), (6,)]
        reader.close()
        with pytest.raises(ReadError, match="closed"), reader.reading(groups):
            pass
