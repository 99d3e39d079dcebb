"""Models that draft with another model, and what they say."""

from __future__ import annotations

from transformers import (
    GptOssConfig,
    Qwen3NextConfig,
)

import ollm
from ollm_adapter_qwen3_next import Qwen3NextAdapter

GREEDY = {"do_sample": False, "eos_token_id": None}
SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gpt_oss():
    """Sliding windows, sinks and experts."""
    return GptOssConfig(**SIZES, sliding_window=64, num_local_experts=4, num_experts_per_tok=2)


def qwen3_next():
    """Recurrent states and experts."""
    return Qwen3NextConfig(**Qwen3NextAdapter().tiny_config() | {"vocab_size": 199})


def load(directory, draft=None, num_draft_tokens=10, **options):
    """A model on the CPU, with a draft model if one is given."""
    if draft is not None:
        options |= {"draft": "model", "draft_model": draft, "num_draft_tokens": num_draft_tokens}
    return ollm.load(directory, device="cpu", **options)


def text_of(directory, prompt, num_new, **options):
    """Greedy tokens [T], the prompt's included, and the stats."""
    with load(directory, **options) as model:
        return model.generate(prompt[None], max_new_tokens=num_new, **GREEDY)[0], model.stats
