"""Weights on their way to a device with memory of its own: real files, the real reader, and a
device that does things in any order that it may.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from simulated_bus import CPU, SimulatedBus

from ollm_conformance import WeightStreamerConformance
from ollm_core import ParameterSource, ReadError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.device.buffers import ALIGNMENT
from ollm_core.device.memory import OwnMemory
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.profiling import Profile
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.streamer import TieredStreamer
from ollm_core.weights.units import Parameter, Units, WeightUnit

NUM_UNITS = 6


class TestWeightsForADevice(WeightStreamerConformance):
    """The whole contract, with two memories."""

    @classmethod
    def open_streamer(cls, units, files, dtype, account):
        bus = SimulatedBus(7)
        accounts = PerMemory(
            account, MemoryAccount("host memory", 10**9)
        )  # the contract is of the first
        source = open_source(files)
        weights = TieredStreamer(units, source, dtype, CPU, accounts, memory=OwnMemory(bus))
        try:
            weights.fit(account.limit - weights.fixed_device_bytes, weights.least_bytes(0))
        except BaseException:
            weights.close()
            raise
        return weights


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Units of one tensor each, whose parameters are the bytes as they are read."""
    directory = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(23 + i, 129).bfloat16() for i in range(NUM_UNITS + 1)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(directory)
    cut = [
        WeightUnit(name, (Parameter(name, info.shape, ParameterSource((name,)), (info,)),))
        for name, info in sorted(checkpoint.tensors.items())
    ]
    units = Units(tuple(cut[:5]), (cut[5],), cut[6], checkpoint.tensors["t0"])
    return tensors, units, list(checkpoint.files)


class Unsure:
    """A reading engine that fails now and then, by the next of `fails`."""

    def __init__(self, source, fails):
        self._source = source
        self._fails = fails

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, tensors, buffer):
        if self._fails.random() < 0.1:
            raise ReadError("not this time")
        return self._source.read(tensors, buffer)


class Stop(Exception):
    """Ends a pass in the middle."""


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_every_operator_sees_its_layer(stored, seed):
    """Whatever is kept where, whatever fails, and whatever the device does first: operators see the
    weights of their layer from beginning to end, and nothing is held beyond the budgets.
    """
    tensors, units, files = stored
    chosen = random.Random(seed)
    bus = SimulatedBus(seed, queued=True, refuses=seed % 5 == 0)
    device, host = MemoryAccount("device memory", 10**9), MemoryAccount("host memory", 10**9)
    source = Unsure(open_source(files), chosen)
    while True:
        try:
            weights = TieredStreamer(
                units, source, torch.bfloat16, CPU, PerMemory(device, host), memory=OwnMemory(bus)
            )
            break
        except ReadError:
            source._source = open_source(files)
    found = []

    def one_pass():
        for i in range(NUM_UNITS):
            with weights.acquire(i) as (value,):
                assert value.data_ptr() % ALIGNMENT == 0  # wherever it begins in its file
                for _ in range(2):
                    bus.compute(
                        lambda value=value, i=i: found.append(torch.equal(value, tensors[f"t{i}"]))
                    )
                del value
                if chosen.random() < 0.03:
                    raise Stop
                if chosen.random() < 0.2:
                    bus.progress()
                if chosen.random() < 0.1:
                    weights.let_go(i, host=chosen.random() < 0.5)

    with weights:
        for _ in range(chosen.randint(1, 3)):
            budgets = chosen.randint(0, 60_000), chosen.randint(weights.least_bytes(0), 90_000)
            for _ in range(chosen.randint(1, 3)):
                weights.fit(*budgets)
                assert device.used <= weights.fixed_device_bytes + budgets[0]
                assert host.used <= weights.resident.staging_bytes + budgets[1]
                try:
                    one_pass()
                except (ReadError, Stop):
                    continue
    bus.finish()
    assert all(found)
    assert device.used == host.used == 0
    assert not bus.locked


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("num_buffers", [1, 2])
def test_the_next_layer_comes_while_one_is_computed(stored, num_buffers, refuses):
    """If there are two buffers, and copying does not keep the host from asking for the compute."""
    _, units, files = stored
    bus = SimulatedBus(2, queued=True, refuses=refuses)
    accounts = PerMemory(MemoryAccount("device memory", 10**9), MemoryAccount("host memory", 10**9))
    source = open_source(files)
    with TieredStreamer(
        units, source, torch.bfloat16, CPU, accounts, memory=OwnMemory(bus)
    ) as weights:
        before = bus.num_copies + NUM_UNITS
        weights.fit((num_buffers - 1) * weights.slot_bytes, 10**6)
        assert weights.resident.num_host_units == NUM_UNITS
        for i in range(NUM_UNITS):  # what is kept is read when it is first wanted
            with weights.acquire(i):
                pass
        ahead = int(num_buffers == 2 and not refuses)
        for i in range(NUM_UNITS):
            with weights.acquire(i):
                assert bus.num_copies == before + i + 1 + ahead
                copied = bus.copied()
                with bus.compute_is_busy():
                    bus.go_on()
                    assert copied.done


def test_a_profile_tells_how_much_was_hidden(stored):
    """Bytes, the copies' own time, and how long compute waited; in a span, what the host spent."""
    _, units, files = stored
    profile, bus = Profile(), SimulatedBus(2, queued=True)
    accounts = PerMemory(MemoryAccount("device memory", 10**9), MemoryAccount("host memory", 10**9))
    source = open_source(files)
    with TieredStreamer(
        units, source, torch.bfloat16, CPU, accounts, span=profile.span, memory=OwnMemory(bus)
    ) as weights:
        weights.fit(weights.slot_bytes, weights.least_bytes(0))
        for i in range(NUM_UNITS):
            with weights.acquire(i):
                bus.compute(lambda: None)
        bus.finish()
        uploads = weights.uploads
    sent = sum(
        total.numbers["num_bytes"]
        for (_, name), total in profile.totals.items()
        if name == "send to the device"
    )
    assert uploads.num_bytes == sent >= sum(unit.file_bytes for unit in units.in_pass_order)
    assert uploads.copy_seconds > 0
    assert uploads.waited_seconds > 0


def test_what_a_device_keeps_takes_no_host_memory_of_its_own(stored, monkeypatch):
    """It comes through the little that is held for that, as the accounts say."""
    tensors, units, files = stored
    bus = SimulatedBus(2)
    device, host = MemoryAccount("device memory", 10**9), MemoryAccount("host memory", 10**9)
    source = open_source(files)
    monkeypatch.setattr(OwnMemory, "host_buffer", lambda *_: pytest.fail("taken"))
    with TieredStreamer(
        units, source, torch.bfloat16, CPU, PerMemory(device, host), memory=OwnMemory(bus)
    ) as weights:
        weights.fit(10**6, 0)
        for i in range(NUM_UNITS):
            with weights.acquire(i) as (value,):
                assert torch.equal(value, tensors[f"t{i}"])
        assert weights.bytes_read == 0
        assert host.peak == weights.resident.staging_bytes == sum(bus.locked.values())
    assert device.used == host.used == 0
    assert not bus.locked
