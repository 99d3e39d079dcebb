"""Routed experts on their way to a device with memory of its own, which does things in any order
that it may.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from simulated_bus import CPU, SimulatedBus

from ollm_core import ParameterSource
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.device.buffers import ALIGNMENT
from ollm_core.device.memory import OwnMemory
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.weights.experts.store import ExpertStore
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.units import Parameter, WeightUnit

NUM_EXPERTS = {0: 6, 1: 5}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Experts of two layers, whose one parameter is the bytes as they are read."""
    directory = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    names = [f"{i}.{e}" for i, count in NUM_EXPERTS.items() for e in range(count)]
    tensors = {name: torch.randn(19, 130).bfloat16() for name in names}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "x"}')
    infos = open_checkpoint(directory).tensors

    def unit(name):
        info = infos[name]
        return WeightUnit(name, (Parameter("a", info.shape, ParameterSource((name,)), (info,)),))

    units = {i: [unit(f"{i}.{e}") for e in range(count)] for i, count in NUM_EXPERTS.items()}
    return tensors, units, directory / "model.safetensors"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_every_operator_sees_its_expert(stored, seed):
    """Experts from the disk and from host memory, those that take another's place there too, and
    layers that are left in the middle.
    """
    tensors, units, path = stored
    chosen = random.Random(seed)
    bus = SimulatedBus(seed, queued=True)
    accounts = PerMemory(MemoryAccount("device memory", 10**9), MemoryAccount("host memory", 10**9))
    found = []
    with (
        open_source([path]) as source,
        ExpertStore(units, source, torch.bfloat16, CPU, accounts, memory=OwnMemory(bus)) as store,
    ):
        for _ in range(3):
            room = chosen.choice([0, store.fixed_device_bytes])
            placement = store.place(room, chosen.randint(store.least_bytes, 80_000))
            if placement.num_device:  # what is kept there is copied by operators of its own
                placement = store.place(0, 10**5)
            store.shrink(placement)
            store.grow(placement)
            assert accounts[0].used <= room
            for i, count in [*NUM_EXPERTS.items()] * 2:
                wanted = {e: chosen.randint(1, 9) for e in range(count) if chosen.random() < 0.6}
                with store.experts(i, wanted) as experts:
                    for e, (value,) in experts:
                        assert value.data_ptr() % ALIGNMENT == 0
                        for _ in range(2):
                            bus.compute(
                                lambda value=value, name=f"{i}.{e}": found.append(
                                    torch.equal(value, tensors[name])
                                )
                            )
                        if chosen.random() < 0.05:
                            break
    bus.finish()
    assert all(found)
    assert not bus.locked
