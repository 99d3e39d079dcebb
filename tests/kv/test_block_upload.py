"""Blocks of KV on their way to a device with memory of its own, which does things in any order that
it may.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_content import geometry_of
from simulated_bus import CPU, SimulatedBus

from ollm_conformance import KVStoreConformance
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.memory import OwnMemory
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import HostKVStore
from ollm_core.memory.accounts import MemoryAccount

BLOCK = 4


def open_store(kv, geometry, bus, account, directory, device_account=None):
    """A store in host memory or on disk, which reads two blocks at a time."""
    if kv == "host":
        return HostKVStore(geometry, account, device_account, memory=OwnMemory(bus))
    memory = OwnMemory(bus)
    return DiskKVStore(
        geometry, account, directory, "f00d", device_account, staging_bytes=8192, memory=memory
    )


class TestHostStoreForADevice(KVStoreConformance):
    """The whole contract, with two memories."""

    num_examples = 5
    kv = "host"

    @classmethod
    def open_store(cls, shape, account, directory):
        geometry = geometry_of(shape)
        return open_store(cls.kv, geometry, SimulatedBus(11), account, directory)


class TestDiskStoreForADevice(TestHostStoreForADevice):
    """The same on disk."""

    kv = "disk"


@pytest.mark.parametrize("kv", ["host", "disk"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_every_operator_sees_its_block(tmp_path_factory, kv, seed):
    """Blocks of some sequences, read in full or in part, some of which go while the device is still
    behind.
    """
    chosen = random.Random(seed)
    bus = SimulatedBus(seed, queued=True)
    geometry = KVGeometry.uniform(2, 2, 3, torch.float32, CPU, BLOCK)
    device, host = MemoryAccount("device memory", 10**6), MemoryAccount("host memory", 10**6)
    found = []
    with open_store(kv, geometry, bus, host, tmp_path_factory.mktemp("kv"), device) as store:
        assert device.used > 0
        sequences = {store.new_sequence(): chosen.randint(1, 40) for _ in range(3)}
        written = {}
        for sequence, num_tokens in sequences.items():
            store.reserve(sequence, num_tokens)
            for layer_idx in range(2):
                pair = torch.randn(2, 2, num_tokens, 3)
                store.append(layer_idx, sequence, *pair)
                written[layer_idx, sequence] = pair
        for _ in range(8):
            sequence = chosen.choice(list(sequences))
            layer_idx = chosen.randrange(2)
            begin = 0
            for keys, values in store.blocks(layer_idx, sequence):
                end = begin + keys.shape[1]
                right = written[layer_idx, sequence][:, :, begin:end]
                for _ in range(2):
                    bus.compute(
                        lambda pair=(keys, values), right=right: found.append(
                            torch.equal(torch.stack(pair), right)
                        )
                    )
                begin = end
                if chosen.random() < 0.05:
                    break
            else:
                assert begin == sequences[sequence]
            if len(sequences) > 1 and chosen.random() < 0.1:
                store.release(sequence)
                del sequences[sequence]
    bus.finish()
    assert found
    assert all(found)
    assert device.used == host.used == 0
    assert not bus.locked
