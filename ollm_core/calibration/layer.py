"""Measures what a layer costs by itself, without its products and its attention: for each call, and
for each number that it makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from ollm_core.calibration.timing import least_seconds

_PAST = 64
_NEW_TOKENS = 512
_CALLS = 20


def measure_layer(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Calls of a layer per second where its sizes are next to nothing, and numbers that a large one
    makes per second for the tokens of a prompt: the outputs of its products, normed, rotated, gated
    and added up.
    """
    with torch.inference_mode():
        return 1 / _call_seconds(device, dtype), 1 / _number_seconds(device, dtype)


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    inner: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def outputs(self) -> int:
        """Of all products of a layer, for one token."""
        attention = (self.heads + 2 * self.kv_heads) * self.head_dim + self.hidden
        return attention + 2 * self.inner + self.hidden

    def config(self) -> LlamaConfig:
        found = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=1,
        )
        found._attn_implementation = "eager"
        return found


_SMALL, _LARGE = _Sizes(64, 128, 4, 2), _Sizes(2048, 5632, 16, 4)


class _Past:
    """Stands for a cache: new keys and values go behind the same past ones at each call."""

    def __init__(self, past: torch.Tensor) -> None:
        self._past = past

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self._past, keys], 2), torch.cat([self._past, values], 2)


def _call_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Of one new token through transformers' own layer."""
    config = _SMALL.config()
    layer: Any = LlamaDecoderLayer(config, 0).to(device, dtype).eval()
    hidden = torch.zeros(1, 1, _SMALL.hidden, dtype=dtype, device=device)
    positions = torch.tensor([[_PAST]], device=device)
    rotary = LlamaRotaryEmbedding(config).to(device)(hidden, positions)
    shape = (1, _SMALL.kv_heads, _PAST, _SMALL.head_dim)
    past = _Past(torch.zeros(shape, dtype=dtype, device=device))

    def calls() -> None:
        for _ in range(_CALLS):
            layer(hidden, position_ids=positions, past_key_values=past, position_embeddings=rotary)

    return least_seconds(calls, device) / _CALLS


def _number_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Of one output of a product: all that a layer computes for a prompt beside products and
    attention, shared out among these.
    """
    config = _LARGE.config()
    layer: Any = LlamaDecoderLayer(config, 0).to(device, dtype).eval()
    hidden = torch.randn(1, _NEW_TOKENS, _LARGE.hidden, device=device).to(dtype)
    inner = torch.randn(1, _NEW_TOKENS, _LARGE.inner, device=device).to(dtype)
    query = hidden.view(1, _NEW_TOKENS, _LARGE.heads, -1).transpose(1, 2)
    key = query[:, : _LARGE.kv_heads]
    positions = torch.arange(_NEW_TOKENS, device=device)[None]
    cos, sin = LlamaRotaryEmbedding(config).to(device)(hidden, positions)

    def work() -> None:
        layer.input_layernorm(hidden)
        apply_rotary_pos_emb(query, key, cos, sin)
        query.float()
        hidden.float().to(dtype)
        _ = hidden + hidden
        layer.post_attention_layernorm(hidden)
        _ = layer.mlp.act_fn(inner) * inner
        _ = hidden + hidden

    return least_seconds(work, device) / (_NEW_TOKENS * _LARGE.outputs)
