"""Tiny models that quote: no real weights of their families can be had, and random ones repeat
nothing on purpose.

A text is random tokens, and then some of them again from a random place on. The model learns to go
on with what stood there; 5 to 10 minutes' worth of one core's work at most, with a fixed seed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedConfig, Qwen3NextConfig

VOCABULARY = 128
NUM_TOKENS = 48
"""Of a text."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def gpt_oss() -> PreTrainedConfig:
    """A layer that slides, one that does not, four experts each."""
    return GptOssConfig(
        **_SIZES,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_key_value_heads=2,
        intermediate_size=64,
        sliding_window=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def qwen3_next() -> PreTrainedConfig:
    """A layer with a state, one with attention, four experts and a shared one each."""
    return Qwen3NextConfig(
        **_SIZES,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_key_value_heads=2,
        intermediate_size=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


FAMILIES = {"gpt-oss": gpt_oss, "qwen3-next": qwen3_next}


def texts(number: int, num_tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [number, S] and where of them the next one can be known, bool [number, S - 1]."""
    half = num_tokens // 2
    ids = torch.rand(number, VOCABULARY, generator=draw).argsort(dim=1)[:, :num_tokens]
    starts = torch.randint(0, half // 2, (number, 1), generator=draw)
    places = starts + torch.arange(num_tokens - half)
    ids[:, half:] = ids.gather(1, places.clamp(max=half - 1))
    known = torch.zeros(number, num_tokens - 1, dtype=torch.bool)
    known[:, half:] = places[:, 1:] < half
    return ids, known


def train(family: str, directory: Path, *, steps: int, seconds: float) -> dict[str, Any]:
    """Write a model of `family` that quotes; -> how it went. It ends after `steps`, some `seconds`,
    or once nearly all that can be known is.
    """
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family](),
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    start, right, step = time.perf_counter(), 0.0, 0
    while step < steps and time.perf_counter() - start < seconds and right < 0.995:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 50, 1.0)
        ids, known = texts(32, NUM_TOKENS, draw)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][known]
        wanted = ids[:, 1:][known]
        loss = functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.9 * right + 0.1 * float((logits.argmax(dim=-1) == wanted).float().mean())
        step += 1
        if step % 50 == 0:
            print(f"  {family}: {step} steps, loss {loss:.3f}, {right:.1%} right", file=sys.stderr)
    model.config.dtype = torch.float32
    model.save_pretrained(directory)
    return {
        "family": family,
        "steps": step,
        "seconds": round(time.perf_counter() - start, 1),
        "right_at_the_end": round(right, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
