"""Memory of a pass beside weights and KV: what is planned covers it, and is all that is taken."""

from __future__ import annotations

import pytest
import torch
from smallest_memory import check_refusal_to_the_byte

import ollm
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.traced_cache import APART
from ollm_core.memory.tracker import AllocationTracker

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}


@pytest.mark.parametrize(("dtype", "attention"), [("float32", "exact"), ("bfloat16", "blockwise")])
def test_budget_is_enforced_to_the_byte(make_llama, ids, dtype, attention):
    """A run passes at the budget that the refusal names, and fails one byte below."""
    directory = make_llama(getattr(torch, dtype), **WIDE)
    prompt = ids(300)

    def run(num_bytes):
        with ollm.load(
            directory,
            device="cpu",
            device_memory=num_bytes,
            kv="device",
            chunk_size=128,
            attention=attention,
        ) as model:
            model(input_ids=prompt[None], logits_to_keep=1)
            return model.stats.device_peak_bytes

    check_refusal_to_the_byte(run, 4_000_000)


@pytest.mark.parametrize("attention", ["exact", "blockwise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_activations_cover_the_real_ones(make_llama, ids, dtype, attention):
    """What torch really allocates in a pass is at most what was planned, and at least 60% of it."""
    directory = make_llama(getattr(torch, dtype), **WIDE)
    with ollm.load(
        directory, device="cpu", device_memory="40MB", chunk_size=256, attention=attention
    ) as model:
        cache = model.new_cache("device")
        prompt = ids(1000)
        model(input_ids=prompt[None, :500], past_key_values=cache, logits_to_keep=1)
        work = [NewTokens(cache.rows[0], prompt[500:], 500)]
        with model.engine._pass_planner.admit(cache.store, work) as plan:
            pass
        with AllocationTracker("cpu") as tracker:
            model.engine.run(cache.store, work)
        growth = cache.store.tier_bytes().device
    assert tracker.peak <= plan.needed.device + growth
    assert tracker.peak >= 0.6 * plan.needed.device


def test_blockwise_peak_does_not_grow_with_the_prompt(tiny, ids):
    """Twice the prompt adds no more than its hidden states to what a pass takes."""
    with ollm.load(
        tiny, device="cpu", kv="disk", chunk_size=128, attention="blockwise", kv_dir=tiny.parent
    ) as model:
        needed = []
        for num_tokens in (1024, 2048):
            cache = model.new_cache()
            work = [NewTokens(cache.store.new_sequence(), ids(num_tokens), 0)]
            with model.engine._pass_planner.admit(cache.store, work) as plan:
                needed.append(plan.needed.device)
    assert needed[1] - needed[0] == 1024 * (64 * 4 + 18)  # and its ids and positions


def test_room_for_converting_larger_weights_is_room_to_work_in(make_llama):
    """A layer whose own weights leave some of it free takes that much less beside, down to
    nothing.
    """
    directory = make_llama(torch.float32, **WIDE)
    with ollm.load(directory, device="cpu") as model:
        workspace = model.engine._pass_planner._workspace
        shape = 1, 64, 0, "exact", APART
        whole, num_units = workspace.layer_bytes(*shape), len(model.weights.units)
        assert workspace.layer_bytes(*shape, [1000] * num_units) == whole - 1000
        assert workspace.layer_bytes(*shape, [1000] * (num_units - 2) + [10] * 2) == whole - 10
        assert workspace.layer_bytes(*shape, [2 * whole] * num_units) == 0
