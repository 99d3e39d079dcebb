"""Reading engines beside a real NVIDIA driver. Skipped where there is no CUDA device."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import ollm
from ollm_conformance import ByteSourceConformance
from ollm_core.weights.sources.kvikio import KvikioSource

_HERE = torch.cuda.is_available() and importlib.util.find_spec("kvikio") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _HERE, reason="no CUDA device, or no KvikIO"),
]

if _HERE:  # a check of the suite that is skipped counts as failed

    class TestKvikioOnCuda(ByteSourceConformance):
        """Every promise of a reading engine, with the driver initialised."""

        @classmethod
        def open_source(cls, paths):
            torch.zeros(1, device="cuda:0")
            return KvikioSource(paths)


def test_weights_of_every_engine_are_the_same(make_llama, ids):
    """Streamed to the device through buffers that may be pinned: the same logits, bit for bit."""
    directory = make_llama(torch.bfloat16)
    found = []
    for reader in ("direct", "kvikio"):
        with ollm.load(
            directory, device="cuda:0", device_memory="64MB", reader=reader, device_layers=0
        ) as model:
            found.append(model(input_ids=ids(40)[None].cuda()).logits)
            assert model.stats.reader == reader
    assert torch.equal(*found)
