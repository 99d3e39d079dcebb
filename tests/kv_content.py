"""Random keys and values for the tests of KV stores, and all that a store holds."""

from __future__ import annotations

import torch

from ollm_conformance.parts.lists import KVShape
from ollm_core import KVStore
from ollm_core.contracts.kv import KVGeometry


def geometry_of(shape: KVShape) -> KVGeometry:
    """A shape of the conformance suite as a geometry of core."""
    return KVGeometry(shape.kinds, shape.dtype, torch.device("cpu"), shape.block_size)


def random_keys(
    num_tokens: int, seed: int, geometry: KVGeometry, layer_idx: int = 0
) -> torch.Tensor:
    """Random keys or values [G, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    kind = geometry.kinds[layer_idx]
    shape = kind.num_kv_heads, num_tokens, kind.head_dim
    return torch.randn(shape, generator=generator).to(geometry.dtype)


def content(
    store: KVStore, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
) -> torch.Tensor:
    """Everything `blocks` gives, as [2, G, S, D]."""
    pairs = [torch.stack(pair) for pair in store.blocks(layer_idx, sequence, num_tokens, first)]
    kind = store.geometry.kinds[layer_idx]
    empty = torch.empty(2, kind.num_kv_heads, 0, kind.head_dim, dtype=store.geometry.dtype)
    return torch.cat([empty, *pairs], dim=2)
