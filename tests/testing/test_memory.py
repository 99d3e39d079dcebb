"""What a tiny Llama is planned to hold, and what it holds."""

from __future__ import annotations

from dataclasses import replace

import torch

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core.testing import DryRun, Registry, TierTracker, open_dry_run, plan_run

IDS = torch.arange(10, 30)


def test_a_plan_is_what_the_run_holds(tiny):
    """The peaks that `plan_run` tells are those of the run's accounts, in the limits it gives; a
    subclass that plans wrong is heard.
    """

    class Twice(DryRun):
        def run(self, budgets, scenario, **options):
            return super().run(budgets, replace(scenario, context=2 * scenario.context), **options)

    adapter = LlamaAdapter()
    registry = Registry.of(adapter)
    options = {"num_tokens": 22, "num_new": 2, "kv": "host", "chunk_size": None}
    for roomy in (False, True):
        plan = plan_run(open_dry_run(adapter, tiny, registry), roomy=roomy, **options)
        with ollm.load(
            tiny,
            device="cpu",
            device_memory=plan.device_memory,
            host_memory=plan.host_memory,
            attention="exact",
            kv="host",
        ) as model:
            model.generate(IDS[None], max_new_tokens=2, do_sample=False)
            stats = model.stats
        assert stats.device_peak_bytes == plan.device_peak <= plan.device_memory
        assert stats.host_peak_bytes == plan.host_peak <= plan.host_memory
    wrong = plan_run(open_dry_run(adapter, tiny, registry, make=Twice), roomy=True, **options)
    assert wrong.device_peak > plan.device_peak


def test_memory_is_told_apart(small):
    """KV counts for the host unless it is on the device; both go down when the cache is closed."""
    for on_device in (True, False):
        with TierTracker(kv_on_device=on_device) as tracker:
            cache = small.new_cache(kv="device" if on_device else "host")
            small(input_ids=IDS[None], past_key_values=cache)
            held = cache.store.tier_bytes()
            stored = held.device if on_device else held.host
            host = tracker.host_used
            cache.close()
        assert stored
        assert tracker.peak
        assert host == (0 if on_device else stored)
        assert tracker.host_used == 0
