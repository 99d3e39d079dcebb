"""Weights on three tiers, some resident and the rest through the ring, keep the contract."""

from __future__ import annotations

import torch

from ollm_conformance import WeightStreamerConformance
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.streamer import TieredStreamer

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
