"""Weights on three tiers, some resident and the rest through the ring, keep the contract."""

from __future__ import annotations

import time

import torch
from weight_units import unit_of

from ollm_conformance import WeightStreamerConformance
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.weights.sources.posix import DirectSource, open_source
from ollm_core.weights.streamer import TieredStreamer
from ollm_core.weights.units import Units

CPU = torch.device("cpu")


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


class SlowSource(DirectSource):
    """Takes its time for each read."""

    def read(self, tensors, buffer):
        time.sleep(0.01)
        return super().read(tensors, buffer)


def test_waiting_for_a_slow_disk_is_told_apart(saved):
    """Every byte is waited for where nothing is computed: units that stay once, others in every
    pass. `reading_seconds` has the time of both.
    """
    _, checkpoint = saved
    cut = [unit_of(checkpoint, f"t{i}") for i in range(7)]
    units = Units(tuple(cut[:5]), (cut[5],), cut[6], checkpoint.tensors["t0"])
    device = MemoryAccount("device", 600_000)
    source = SlowSource(list(checkpoint.files))
    accounts = PerMemory(device, MemoryAccount("host memory", 0))
    with TieredStreamer(units, source, torch.float32, CPU, accounts) as weights:
        weights.fit(device.limit - weights.fixed_device_bytes, 0)
        num_streamed = len(weights.resident.streamed)
        num_kept = 6 - num_streamed
        assert num_kept > 0
        assert num_streamed > weights.resident.num_slots
        for _ in range(4):
            for unit_idx in range(6):
                with weights.acquire(unit_idx):
                    pass
        reading, waited = weights.reading_seconds
        assert reading >= 0.01 * (1 + num_kept + 4 * num_streamed)  # and the norm
        assert reading - weights.read_seconds >= 0.01 * (1 + num_kept)
        # While some are loaded others are read ahead, which nobody waits for.
        assert waited >= 0.005 * (num_kept + 3 * num_streamed)
