"""What a layer remembers, as transformers' own cache of the model has it: seen in that cache after
a run, and put back into one for a call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ollm_core.contracts.kv import CacheKind, StateShape
from ollm_core.errors import UnsupportedError, one_line

_KNOWN = frozenset(
    {
        "DummyLayer",
        "DynamicIndexedLayer",
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    }
)


_WINDOWS = ("attention_chunk_size", "sliding_window")
"""What transformers' cache asks every config for, though not all classes of models know it."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """What one layer remembers."""

    kind: CacheKind
    convolutions: tuple[int, ...] = ()
    """Numbers of the states of convolutions, in the order of `kind.states`, before the others."""
    recurrences: tuple[int, ...] = ()
    """Numbers of the recurrent states."""
    heads: int = 0
    """Of keys and values. What an index of them keeps for each token lies in the heads after."""
    index_dim: int = 0
    """Numbers of that for each token, in the dtype of keys; 0: the layer has no index."""
    index_dtype: torch.dtype | None = None
    """Of the index, where it is not that of keys: its bits are kept as so many more numbers."""
    position_axes: int = 0
    """Of the positions of all tokens, which a layer with an index may keep beside it; 0: none."""
    begun: tuple[bool, ...] = ()
    """By number, whether transformers says that there is a state after the first token."""

    def pack(self, keys: Tensor, values: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """New keys and values [R, g, T, D], and what an index keeps [R, T, I], as they are stored:
        [R, G, T, D] both.
        """
        size = self.kind.head_dim
        keys, values = _padded(keys, size), _padded(values, size)
        if not self.index_dim:
            return keys, values
        assert index is not None, "the model was followed when it was opened"
        index = index.contiguous().view(keys.dtype)
        rows, count = index.shape[:2]
        more = self.kind.num_kv_heads - self.heads
        spread = _padded(index, more * size).view(rows, count, more, size).transpose(1, 2)
        return torch.cat([keys, spread], 1), torch.cat([values, torch.zeros_like(spread)], 1)

    def fill(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        """Put the past, [R, G, S, D] as it is stored, into a fresh `layer` of transformers'
        cache.
        """
        if self.index_dim:
            rows, _, count, _ = keys.shape
            spread = keys[:, self.heads :].transpose(1, 2).reshape(rows, count, -1)
            index = spread[..., : self.index_dim].contiguous().view(self.index_dtype or keys.dtype)
            layer.lazy_initialization_indexer(index)
            layer.indexer_keys = index
            keys, values = keys[:, : self.heads], values[:, : self.heads]
        kept = self.kind
        if self.index_dim or kept.key_dim:
            keys = keys[..., : kept.key_dim or kept.head_dim].contiguous()
            values = values[..., : kept.value_dim or kept.head_dim].contiguous()
        DynamicLayer.lazy_initialization(layer, keys, values)
        layer.keys, layer.values = keys, values

    def fill_positions(self, layer: Any, num_tokens: int, rows: int, like: Tensor) -> None:
        """Let `layer` say which positions, [A, R, S], its tokens have, where it keeps them."""
        if self.position_axes:
            numbers = torch.arange(num_tokens, device=like.device)
            layer.indexer_position_ids = (
                numbers.expand(self.position_axes, rows, -1) if num_tokens else None
            )

    def fill_states(self, layer: Any, states: Sequence[Tensor]) -> list[Tensor]:
        """Put states, [R, ...] each, into a fresh `layer`, which may change them; returns those
        that are kept apart from it.
        """
        tensors = iter(states)
        for number in self.convolutions:
            state = next(tensors)
            layer.lazy_initialization(conv_states=state, state_idx=number)
            layer.conv_states[number] = state
        for number in self.recurrences:
            state = next(tensors)
            layer.lazy_initialization(recurrent_states=state, state_idx=number)
            layer.recurrent_states[number] = state
        for number, begun in enumerate(self.begun):
            layer.has_previous_state[number] = begun
        return list(tensors)

    def states(self, layer: Any) -> list[Tensor]:
        """The states [R, ...] that a call has left in `layer`."""
        convolutions, recurrences = self.states_by_kind(layer)
        return [*convolutions, *recurrences]

    def states_by_kind(self, layer: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The same, those of convolutions and the recurrent ones."""
        return (
            [layer.conv_states[number] for number in self.convolutions],
            [layer.recurrent_states[number] for number in self.recurrences],
        )


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """The empty cache that transformers makes for a model, with a layer for each of its layers.
    Raises UnsupportedError if it makes none.
    """
    try:
        return DynamicCache(config=_without_stray(config.get_text_config(decoder=True)))
    except Exception as error:
        raise UnsupportedError(
            f"transformers makes no cache for a {config.model_type} model: {one_line(error)}",
            hint="a model keeps its past in transformers' own cache; this one is not made so",
        ) from error


def _without_stray(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same without windows that its class does not know, which no mask of the model goes by."""
    kind = type(config)
    stray = [name for name in _WINDOWS if name in vars(config) and name not in _fields(kind)]
    if not stray or any(name in vars(kind()) for name in stray):
        return config
    config = copy.copy(config)
    for name in stray:
        delattr(config, name)
    return config


def _fields(kind: type) -> Sequence[str]:
    """What a config's class says that it knows."""
    return tuple(getattr(kind, "__dataclass_fields__", ()))


def layer_maker(like: Any) -> Callable[[], Any]:
    """What makes an empty layer of the kind of `like`, and holds none."""
    options: dict[str, int] = {}
    if isinstance(like, DynamicSlidingWindowLayer):
        options["sliding_window"] = like.sliding_window
    if isinstance(like, LinearAttentionCacheLayerMixin):
        options["number_of_states"] = like.number_of_states
    kind: Callable[..., Any] = type(like)
    return functools.partial(kind, **options)


def pretend(layer: Any, num_tokens: int, rows: int, like: Tensor) -> None:
    """Let an empty `layer` say that it has `num_tokens`, for masks and positions: it holds none."""
    pretend_keys(layer, num_tokens, rows, like)
    if isinstance(layer, LinearAttentionCacheLayerMixin) and num_tokens:
        for number in layer.has_previous_state:
            layer.has_previous_state[number] = True


def pretend_keys(layer: Any, num_tokens: int, rows: int, like: Tensor) -> None:
    """The same of its keys and values alone."""
    if isinstance(layer, DynamicLayer) and num_tokens:
        keys = like.new_empty(1).expand(rows, 1, num_tokens, 1)
        DynamicLayer.lazy_initialization(layer, keys, keys)
        layer.keys = layer.values = keys
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = num_tokens


def remembered(
    layer: Any, layer_idx: int, dtype: torch.dtype, model: str, apart: Sequence[Tensor] = ()
) -> LayerMemory:
    """What a `layer` of a cache holds after a run of one row, and the states that are kept `apart`
    from it, which come last. Raises UnsupportedError for what core cannot keep.
    """

    def error(what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{model} keeps {what} in layer {layer_idx}",
            hint="core keeps keys and values of each token, and states of one size",
        )

    if type(layer).__name__ not in _KNOWN:
        raise error(f"its past in a {type(layer).__name__}")
    kind, window = "none", None
    heads = key_dim = value_dim = 0
    keys: Any = getattr(layer, "keys", None)
    values: Any = getattr(layer, "values", None)
    if keys is not None and keys.numel():
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:2] != values.shape[:2]:
            raise error(f"keys {list(keys.shape)} and values {list(values.shape)}")
        if {keys.dtype, values.dtype} != {dtype}:
            raise error(f"keys in {keys.dtype} and values in {values.dtype}")
        kind, heads = "full", keys.shape[1]
        key_dim, value_dim = keys.shape[3], values.shape[3]
        if isinstance(layer, DynamicSlidingWindowLayer):
            kind, window = "sliding", layer.sliding_window
            if window < 2:
                raise error(f"a window of {window} tokens")
    own_heads, index_dim = heads, 0
    index: Any = getattr(layer, "indexer_keys", None)
    positions: Any = getattr(layer, "indexer_position_ids", None)
    if index is not None:
        if index.dtype not in (dtype, torch.float32) or index.dim() != 3 or not heads:
            raise error(f"an index {list(index.shape)} in {index.dtype}")
        index_dim = index.shape[2] * index.itemsize // dtype.itemsize
        heads += -(-index_dim // max(key_dim, value_dim))
    convolutions: list[int] = []
    recurrences: list[int] = []
    begun: tuple[bool, ...] = ()
    states: list[StateShape] = []
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        begun = tuple(layer.has_previous_state[i] for i in range(layer.number_of_states))
        pairs: tuple[tuple[dict[int, Tensor | None], Callable[[int], None]], ...] = (
            (layer.conv_states, convolutions.append),
            (layer.recurrent_states, recurrences.append),
        )
        for held, note in pairs:
            for number, state in held.items():
                if state is None:
                    continue
                if state.dtype not in (dtype, torch.float32):
                    raise error(f"a state in {state.dtype}")
                note(number)
                states.append(StateShape(tuple(state.shape[1:]), state.dtype == torch.float32))
    for state in apart:
        if state.dtype not in (dtype, torch.float32) or state.shape[:1] != (1,):
            raise error(f"a state {list(state.shape)} in {state.dtype}")
        states.append(StateShape(tuple(state.shape[1:]), state.dtype == torch.float32))
    if states and kind == "none":
        kind = "recurrent"
    found = CacheKind(
        kind,  # type: ignore[arg-type]
        heads,
        max(key_dim, value_dim),
        window,
        tuple(states),
        *((key_dim, value_dim) if key_dim != value_dim else (0, 0)),
    )
    return LayerMemory(
        found,
        tuple(convolutions),
        tuple(recurrences),
        own_heads,
        index_dim,
        None if index is None or index.dtype == dtype else index.dtype,
        0 if positions is None else positions.shape[0],
        begun,
    )


def _padded(states: Tensor, size: int) -> Tensor:
    """The last dimension in the size in which it is kept."""
    lacking = size - states.shape[-1]
    return functional.pad(states, (0, lacking)) if lacking else states
