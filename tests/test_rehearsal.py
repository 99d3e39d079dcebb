"""A run without data holds what the real one holds, byte for byte of its accounts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import GptOss, Qwen3Moe
from transformers import AutoConfig, AutoModelForCausalLM

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import DoesNotFitError, ParameterSource
from ollm_core.checkpoint import open_checkpoint, read_config
from ollm_core.parts import take_apart
from ollm_core.registry import Registry
from ollm_core.rehearsal import Budgets, Rehearsal, Scenario

CPU = torch.device("cpu")
NO_LIMIT = 1 << 40


class StackedGptOss(GptOss):
    """gpt-oss with experts that are read one by one, as rows of stacked tensors."""

    def layout(self, config):
        return replace(super().layout(config), experts="mlp.experts")

    def experts(self, config, parameter):
        if ".mlp.experts." not in parameter:
            return ()
        return [ParameterSource((parameter,), row=i) for i in range(config["num_local_experts"])]


FAMILIES = {"llama": LlamaAdapter, "qwen3-moe": Qwen3Moe, "gpt-oss": StackedGptOss}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Writes the tiny random model of a family, once for each dtype."""
    made = {}

    def make(family, dtype):
        if (family, dtype) not in made:
            directory = tmp_path_factory.mktemp(family)
            config = FAMILIES[family]().tiny_config() | {"max_position_embeddings": 4096}
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            model = model.to(getattr(torch, dtype))
            model.config.dtype = getattr(torch, dtype)
            model.save_pretrained(directory)
            made[family, dtype] = directory
        return made[family, dtype]

    return make


def taken_apart(directory, adapter, *, described=False, dtype="auto", device=CPU):
    """The parts of a model for a rehearsal, from its files or from its config.json alone."""
    return take_apart(
        adapter,
        read_config(directory),
        None if described else open_checkpoint(directory),
        {},
        dtype=dtype,
        device=device,
        where=directory,
        bare=True,
    )


def real_run(directory, adapter, budgets, scenario, kv_dir, **options):
    """Statistics of a run, and what its device's account held at the end."""
    prompt = torch.randint(3, 199, (scenario.batch, scenario.prompt_tokens))
    with ollm.load(
        directory,
        device="cpu",
        device_memory=budgets.device,
        host_memory=budgets.host,
        kv=scenario.kv,
        kv_dir=kv_dir if scenario.kv == "disk" else None,
        keep_kv=False,
        attention=scenario.attention,
        chunk_size=scenario.chunk_size,
        registry=Registry.of(adapter),
        **options,
    ) as model:
        found = model.generate(
            prompt, max_new_tokens=scenario.new_tokens, do_sample=False, eos_token_id=None
        )
        assert found.shape[1] == scenario.context
        return model.stats


RUNS = [
    # family, KV tier, what else differs
    ("llama", "device", {"attention": "blockwise"}),
    ("llama", "host", {"chunk_size": 100, "attention": "exact"}),
    ("llama", "disk", {"batch": 3}),
    ("qwen3-moe", "auto", {}),
    ("qwen3-moe", "disk", {"attention": "blockwise", "batch": 2}),
    ("gpt-oss", "device", {"batch": 2}),
    ("gpt-oss", "host", {"attention": "blockwise"}),
    ("gpt-oss", "disk", {"attention": "exact", "chunk_size": 100}),
]


@pytest.mark.parametrize(("family", "kv", "changes"), RUNS)
def test_peaks_are_those_of_the_run(model_of, tmp_path, family, kv, changes):
    """For the smallest budgets, for one with half of the weights kept and for plenty: the peaks of
    both memories, the disk, the chunks and what is kept are those that the run tells; a byte less
    than the smallest is refused by both.
    """
    directory, adapter = model_of(family, "bfloat16"), FAMILIES[family]()
    scenario = replace(Scenario(context=515, new_tokens=6, kv=kv), **changes)
    parts = taken_apart(directory, adapter)
    rehearsal = Rehearsal(parts)
    least = rehearsal.least(scenario, Budgets(1, 1))
    half = parts.checkpoint.total_bytes // 2
    for budgets in (
        least,
        Budgets(least.device + half, least.host),
        Budgets(10**9, 10**9),
    ):
        planned = rehearsal.run(budgets, scenario)
        stats = real_run(directory, adapter, budgets, scenario, tmp_path)
        assert planned.device_peak.device_bytes == stats.device_peak_bytes <= budgets.device
        assert planned.host_peak.host_bytes == stats.host_peak_bytes <= budgets.host
        assert planned.kv_tier == stats.kv_tier
        assert planned.disk_bytes == stats.kv_disk_bytes
        assert planned.held.resident_bytes == stats.resident_bytes
    short = Budgets(least.device - 1, least.host)
    assert not rehearsal.fits(scenario, short)
    with pytest.raises(DoesNotFitError):
        real_run(directory, adapter, short, scenario, tmp_path)
