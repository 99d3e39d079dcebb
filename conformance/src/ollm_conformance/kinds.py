"""Caches that an adapter declares, against those that transformers makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from ollm_core import CacheKind


def same_kinds(declared: Sequence[CacheKind], cache: DynamicCache, what: str) -> None:
    """Raises AssertionError unless each layer's declared cache has the kind and the window of the
    one in `cache`, and the shapes too where a run has filled it.
    """
    layers = list(cache.layers)
    assert len(declared) == len(layers), (
        f"{what}: expected {len(layers)} layers, got {len(declared)}"
    )
    for layer_idx, (kind, layer) in enumerate(zip(declared, layers, strict=True)):
        expected, got = kind_of(layer), (kind.kind, kind.window)
        place = f"{what}: layer {layer_idx}"
        if got[0] == "none":
            assert not _holds(layer), f"{place}: expected what transformers keeps, got nothing"
            continue
        assert got == expected, (
            f"{place}: expected {expected[0]} {expected[1]}, got {got[0]} {got[1]}"
        )
        same_shapes(kind, layer, place)


def same_shapes(kind: CacheKind, layer: Any, what: str) -> None:
    """Raises AssertionError unless `kind` has the heads, or the states, of a `layer` of the same
    kind that a run has filled. Says nothing of an empty one.
    """
    if isinstance(layer, LinearAttentionLayer):
        _same_states(kind, layer, what)
    keys = getattr(layer, "keys", None)
    if keys is None or keys.dim() != 4:
        return
    _, heads, _, dim = keys.shape
    got = kind.key_dim or kind.head_dim
    assert (kind.num_kv_heads, got) == (heads, dim), (
        f"{what}: expected {heads} KV heads of {dim}, got {kind.num_kv_heads} of {got}"
    )


def kind_of(layer: Any) -> tuple[str, int | None]:
    """Kind and window of a layer of a cache in transformers; of its keys, where it has both these
    and states.
    """
    kinds = type(layer).__mro__  # both may be among them
    if LinearAttentionLayer in kinds and DynamicLayer not in kinds:
        return "recurrent", None
    window = getattr(layer, "sliding_window", None)
    return ("sliding", window) if window else ("full", None)


def _same_states(kind: CacheKind, layer: LinearAttentionLayer, what: str) -> None:
    """Shapes, and whether a state is float32 in a model that is not."""
    states = _states(layer)
    if not states:
        return
    plain = layer.dtype == torch.float32
    expected = [(tuple(s.shape[1:]), s.dtype == torch.float32) for s in states]
    got = [(state.shape, state.float32 or plain) for state in kind.states]
    assert got == expected, f"{what}: expected states {expected} (shape, float32), got {got}"


def _states(layer: LinearAttentionLayer) -> list[Tensor]:
    held = *layer.conv_states.values(), *layer.recurrent_states.values()
    return [state for state in held if state is not None]


def _holds(layer: Any) -> bool:
    """Whether a run has left anything in a layer of a cache."""
    keys = getattr(layer, "keys", None)
    states = isinstance(layer, LinearAttentionLayer) and _states(layer)
    return bool(states) or (keys is not None and keys.numel() > 0)
