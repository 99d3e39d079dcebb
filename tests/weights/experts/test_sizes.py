"""What mixtures of experts take of a budget, planned and in truth."""

from __future__ import annotations

import pytest
from mixtures import BOTH, open_moe
from smallest_memory import smallest_budget

from ollm_core import DoesNotFitError
from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.device.dtypes import DTYPES
from ollm_core.engine.batch import NewTokens
from ollm_core.memory.tracker import AllocationTracker


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", BOTH)
def test_budget_is_enforced_to_the_byte(make_moe, ids, family, dtype):
    """A run passes at the budget that the refusal names and fails one byte below; that budget is
    less than one layer with all its experts.
    """
    num_experts = {"mixtral": 64, "qwen3_moe": 256}[family]
    directory = make_moe(family, DTYPES[dtype], num_local_experts=num_experts)
    prompt = ids(300)[None]

    def run(num_bytes):
        with open_moe(directory, device_memory=num_bytes, kv="host", chunk_size=64) as model:
            model(input_ids=prompt, logits_to_keep=1)
            return model.stats.device_peak_bytes

    least, peak = smallest_budget(run)
    assert peak <= least
    with pytest.raises(DoesNotFitError, match=r"new tokens.*, limit"):
        run(least - 1)
    tensors = open_checkpoint(directory).tensors.values()
    assert least < sum(t.num_bytes for t in tensors if "layers.0." in t.name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*BOTH, "qwen2_moe"])
def test_planned_activations_cover_the_real_ones(make_moe, ids, family, dtype):
    """What torch really allocates in a pass is at most what was planned, and at least half of
    it: the plan allows for all tokens of a chunk going to one expert.
    """
    directory = make_moe(family, DTYPES[dtype], hidden_size=128)
    with open_moe(directory, chunk_size=128, device_memory="20MB") as model:
        cache = model.new_cache("device")
        prompt = ids(1000)
        for _ in range(2):  # until all that is kept is there
            model(input_ids=prompt[None], logits_to_keep=1)
        model(input_ids=prompt[None, :500], past_key_values=cache, logits_to_keep=1)
        work = [NewTokens(cache.rows[0], prompt[500:], 500)]
        with model.engine._pass_planner.admit(cache.store, work) as plan:
            pass
        assert model.stats.experts_routed > model.stats.experts_hit > 0
        with AllocationTracker("cpu") as tracker:
            model.engine.run(cache.store, work)
        growth = cache.store.tier_bytes().device
    assert tracker.peak <= plan.needed.device + growth
    assert tracker.peak >= 0.5 * plan.needed.device
