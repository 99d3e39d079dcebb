"""Whole models where the device has memory of its own: the way of every byte is that of a GPU,
which is simulated, and every logit is that of transformers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simulated_bus import CPU, SimulatedBus

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_conformance.subject import CHUNK, Subject, greedy
from ollm_core import DoesNotFitError
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.device.memory import OwnMemory
from ollm_core.engine.checkpoint import CheckpointPolicy
from ollm_core.memory.budgets import NO_LAYER_LIMITS, Budgets, LayerLimits
from ollm_core.model.spec import inspect_model
from ollm_core.planning.dry_run import DryRun, Scenario

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
    monkeypatch.setattr("ollm_core.loader.memory_of", lambda device: OwnMemory(made))
    return made


def dry_run_of(subject, directory, bus):
    """What plans runs of a model over this bus."""
    return DryRun(
        inspect_model(
            subject.adapter,
            read_config(directory),
            open_checkpoint(directory),
            {},
            dtype="auto",
            device=CPU,
            where=directory,
            bare=True,
            memory=OwnMemory(bus),
        )
    )


@pytest.mark.parametrize(
    ("family", "dtype", "kv"),
    [
        ("llama", "float32", "host"),
        ("gpt-oss", "bfloat16", "host"),
        ("qwen3-next", "bfloat16", "disk"),
    ],
)
def test_every_logit_is_that_of_transformers(subject_of, bus, family, dtype, kv):
    """In the least memory, and with layers in each of both and on the disk: a prompt of some chunks
    and new tokens, bit for bit. Both peaks are those of the plan, and nothing is left.
    """
    subject = subject_of(family)
    prompt = subject.prompt(2 * CHUNK + 5)
    expected = subject.reference(dtype).greedy(prompt, NUM_NEW)
    dry_run = dry_run_of(subject, subject.tiny(dtype), bus)
    scenario = Scenario(len(prompt) + NUM_NEW, NUM_NEW, 1, kv, "exact", CHUNK)
    least = dry_run.least(scenario, Budgets(1, 1))
    one_more = dry_run.run(least, scenario).held.slot_bytes
    used = set()
    for device, host, layers in (
        (least.device, least.host, NO_LAYER_LIMITS),
        (least.device + one_more, least.host, LayerLimits(0, 0)),
        (10**9, 10**9, LayerLimits(1, 1)),
    ):
        planned = dry_run.run(Budgets(device, host), replace(scenario, layers=layers))
        options = {"device_memory": device, "host_memory": host, "kv": kv}
        with subject.open(subject.tiny(dtype), **options) as model:
            model.weights.limit_layers(layers)
            weights = model.weights.resident
            model.on_progress(lambda _, weights=weights: used.add(weights.num_uploads))
            tokens, logits = greedy(model, prompt, NUM_NEW)
            stats = model.stats
        bus.finish()
        assert tokens == expected[0]
        assert torch.equal(logits, expected[1])
        assert stats.uploaded_bytes > 0
        assert planned.device_peak.device_bytes == stats.device_peak_bytes <= device
        assert planned.host_peak.host_bytes == stats.host_peak_bytes <= host
        assert not bus.locked
    assert used == {1, 2}
    with pytest.raises(DoesNotFitError):
        dry_run.run(Budgets(least.device - 1, least.host), scenario)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_was_broken_off_goes_on(subject_of, bus, tmp_path, family):
    """Its hidden states, which the device has, are written and read through host memory that is
    paid for.
    """
    subject = subject_of(family)
    prompt = subject.prompt(300)
    expected = subject.reference("bfloat16").greedy(prompt, NUM_NEW)
    options = {"kv": "disk", "kv_dir": tmp_path / "kv", "keep_kv": True}
    resumed = set()

    def interrupt(progress):
        resumed.add(progress.resumed_layers)
        if progress.saved_layers and not progress.resumed_layers:
            raise KeyboardInterrupt

    for broken_off in (True, False):
        with subject.open(subject.tiny("bfloat16"), **options) as model:
            model.engine.checkpoints = CheckpointPolicy(0, 0, 1e9)
            model.on_progress(interrupt)
            if broken_off:
                with pytest.raises(KeyboardInterrupt):
                    greedy(model, prompt, NUM_NEW)
            else:
                tokens, logits = greedy(model, prompt, NUM_NEW)
        bus.finish()
        assert not bus.locked
    assert resumed == {0, 1}
    assert tokens == expected[0]
    assert torch.equal(logits, expected[1])
