"""Whole models where the device has memory of its own: the way of every byte is that of a GPU,
which is simulated, and every logit is that of transformers.
"""

from __future__ import annotations

import pytest
import torch
from simulated_bus import SimulatedBus

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_conformance.subject import CHUNK, Subject, greedy
from ollm_core.budgets import LayerLimits

FAMILIES = {"llama": LlamaAdapter, "gpt-oss": GptOssAdapter, "qwen3-next": Qwen3NextAdapter}
NUM_NEW = 3


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory):
    """A family with its tiny model, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = Subject(FAMILIES[family](), tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def bus(request, monkeypatch):
    """What `load` finds for the CPU."""
    made = SimulatedBus(request.node.name)
    monkeypatch.setattr("ollm_core.loading.bus_of", lambda device: made)
    return made


@pytest.mark.parametrize(
    ("family", "dtype", "kv"),
    [
        ("llama", "float32", "device"),
        ("llama", "bfloat16", "host"),
        ("gpt-oss", "float32", "disk"),
        ("gpt-oss", "bfloat16", "host"),
        ("qwen3-next", "bfloat16", "disk"),
    ],
)
def test_every_logit_is_that_of_transformers(subject_of, bus, family, dtype, kv):
    """In the least memory, and with layers in each of both and on the disk: a prompt of some chunks
    and new tokens, bit for bit. Nothing is held beyond the budgets or for longer than the model.
    """
    subject = subject_of(family)
    prompt = subject.prompt(2 * CHUNK + 5)
    expected = subject.reference(dtype).greedy(prompt, NUM_NEW)
    directory = subject.tiny(dtype)
    least = subject.least_memory(lambda model: greedy(model, prompt, NUM_NEW), directory, kv=kv)
    for device_memory, layers in (
        (least, LayerLimits()),
        ("1GB", LayerLimits(1, 0)),
        ("1GB", LayerLimits(1, 1)),
    ):
        with subject.open(directory, device_memory=device_memory, kv=kv) as model:
            model.weights.held.layer_limits = layers
            tokens, logits = greedy(model, prompt, NUM_NEW)
            stats, uploads = model.stats, model.weights.uploads
        bus.finish()
        assert tokens == expected[0]
        assert torch.equal(logits, expected[1])
        assert uploads.num_bytes > 0
        assert stats.device_peak_bytes <= stats.device_limit_bytes
        assert stats.host_peak_bytes <= stats.host_limit_bytes
        assert not bus.locked
