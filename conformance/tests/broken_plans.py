"""Plans that are wrong in one way each, and models that take what no plan tells."""

from __future__ import annotations

from dataclasses import replace

from broken import broken_adapter
from families import Qwen3Moe

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core.planning.dry_run import DryRun


class KVForgotten(DryRun):
    def run(self, budgets, scenario, **options):
        found = super().run(budgets, scenario, **options)
        moments = [
            replace(moment, host={k: n for k, n in moment.host.items() if not k.startswith("kv")})
            for moment in found.moments
        ]
        return replace(found, moments=moments)


class LongPrompt(DryRun):
    def run(self, budgets, scenario, **options):
        return super().run(budgets, replace(scenario, context=2 * scenario.context), **options)


class ExpertsForgotten(DryRun):
    def run(self, budgets, scenario, **options):
        found = super().run(budgets, scenario, **options)
        moments = [
            replace(moment, device={k: n for k, n in moment.device.items() if "expert" not in k})
            for moment in found.moments
        ]
        return replace(found, moments=moments)


def kv_kept_twice(*args, **options):
    """What goes to host memory has a copy that no account knows of."""
    model = ollm.load(*args, **options)
    real = model.new_cache

    def new_cache(*cache_args, **cache_options):
        cache = real(*cache_args, **cache_options)
        append, copies = cache.store.append, []

        def append_twice(layer_idx, sequence, keys, values):
            copies.extend((keys.clone(), values.clone()))
            append(layer_idx, sequence, keys, values)

        if options.get("kv") == "host":
            cache.store.append = append_twice
        return cache

    model.new_cache = new_cache
    return model


BROKEN_PLANS = [
    broken_adapter(
        "memory.plan", "The plan forgets KV on the host.", LlamaAdapter, dry_run=KVForgotten
    ),
    broken_adapter(
        "memory.plan", "The plan is for twice the prompt.", LlamaAdapter, dry_run=LongPrompt
    ),
    broken_adapter("memory.plan", "The plan forgets experts.", Qwen3Moe, dry_run=ExpertsForgotten),
    broken_adapter(
        "memory.plan", "KV has a copy that nobody counts.", LlamaAdapter, load=kv_kept_twice
    ),
]
