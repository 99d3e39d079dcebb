"""Adapters that are wrong about configs of which no published model is, and no author thinks. For
tests only.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from broken import broken_adapter
from families import Granite, Qwen3Moe

from ollm_adapter_qwen3_next import Qwen3NextAdapter


class UnstatedWindowIsNone(Qwen3Moe):
    """As qwen3_moe is with use_sliding_window alone."""

    defaults = MappingProxyType({"num_key_value_heads": 4, "sliding_window": None})


class TwoKVHeadsAtLeast(Granite):
    def caches(self, config):
        return [
            replace(one, num_kv_heads=max(one.num_kv_heads, 2)) for one in super().caches(config)
        ]


class AsManyValueHeads(Qwen3NextAdapter):
    def recurrent_states(self, config):
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        return super().recurrent_states({**config, "linear_num_value_heads": max(keys * 2, values)})


BROKEN_DRAWN = [
    broken_adapter(
        "configs.drawn",
        "A window that is not stated is none, where transformers has 4,096 tokens.",
        UnstatedWindowIsNone,
    ),
    broken_adapter("configs.drawn", "One KV head is taken for two.", TwoKVHeadsAtLeast),
    broken_adapter(
        "configs.drawn", "Value heads are twice the key heads at least.", AsManyValueHeads
    ),
]
