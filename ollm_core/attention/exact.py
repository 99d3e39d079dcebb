"""Exact attention: transformers' own eager attention of the family, over all keys and values at
once. It is the reference for everything else.

Bit for bit what the un-offloaded model computes for the same chunk. Its memory grows with the
context.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ollm_core.attention.options import CARRIED
from ollm_core.contracts.attention import KVView
from ollm_core.errors import UnsupportedError


def exact_attention(
    module: torch.nn.Module,
    query: Tensor,
    view: KVView,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **options: Any,
) -> Tensor:
    """See Attention. Follows `eager_attention_forward` of the modeling module that `module` comes
    from, which also knows what to do with sinks and soft caps.
    """
    eager = family_eager(module)
    _refuse_unknown(module, eager, options)
    num_new = query.shape[2]
    outputs = []
    for row in range(query.shape[0]):
        keys, values = _gather(view, row, sliding_window)  # [1, G, S, D]
        num_past = view.starts[row] - view.first(row, sliding_window)
        mask = None  # one query sees all that was gathered
        if num_new > 1:
            mask = _causal_mask(query, num_past, keys.shape[2], sliding_window)
        outputs.append(
            eager(module, query[row : row + 1], keys, values, mask, scaling=scaling, **options)[0]
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def family_eager(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """What an attention module of transformers calls where attention is eager: the function in the
    file that its forward is in. Raises UnsupportedError if there is none.
    """
    modeling = sys.modules[inspect.unwrap(type(module).forward).__module__]
    eager = getattr(modeling, "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedError(f"{modeling.__name__} has no eager attention to be exact with")
    return cast("Callable[..., tuple[Tensor, Tensor]]", eager)


def _refuse_unknown(
    module: torch.nn.Module, eager: Callable[..., object], options: Mapping[str, object]
) -> None:
    """Raise UnsupportedError for what `eager` would ignore. A parameter of the module, as sinks
    are, it finds there itself.
    """
    for name, value in options.items():
        if value is None or name in CARRIED or name in known_options(eager):
            continue
        if any(value is parameter for parameter in module.parameters(recurse=False)):
            continue
        raise UnsupportedError(
            f"the eager attention of {type(module).__module__} does not know the option {name!r}"
        )


@functools.lru_cache(maxsize=64)
def known_options(eager: Callable[..., object]) -> frozenset[str]:
    """Names of the parameters of an eager function; asking costs as much as a small layer."""
    return frozenset(inspect.signature(eager).parameters)


def _gather(view: KVView, row: int, window: int | None) -> tuple[Tensor, Tensor]:
    """The keys and values that a row may see, stored and new, each contiguous [1, G, S, D]."""
    if view.store.in_place:
        keys_of, values_of = zip(*view.kept(row, window), strict=True)
        return torch.cat(keys_of, dim=1)[None], torch.cat(values_of, dim=1)[None]
    num_heads, num_new, head_dim = view.keys.shape[1:]
    start = view.starts[row] - view.first(row, window)
    keys = view.keys.new_empty(num_heads, start + num_new, head_dim)
    values = torch.empty_like(keys)
    position = 0
    for past_keys, past_values in view.past(row, window):
        count = past_keys.shape[1]
        keys.narrow(1, position, count).copy_(past_keys)
        values.narrow(1, position, count).copy_(past_values)
        position += count
    keys.narrow(1, start, num_new).copy_(view.keys[row])
    values.narrow(1, start, num_new).copy_(view.values[row])
    return keys[None], values[None]


def _causal_mask(query: Tensor, start: int, num_keys: int, window: int | None) -> Tensor:
    """Additive mask [1, 1, T, S]: zero where a query may see a key, else the dtype's minimum.

    The first query comes after `start` keys; each sees itself and what is before it, `window`
    tokens at most.
    """
    lowest = torch.finfo(query.dtype).min
    mask = query.new_full((query.shape[2], num_keys), lowest)
    mask.triu_(start + 1)
    if window is not None and num_keys > window:
        mask += torch.full_like(mask, lowest).tril_(start - window)
    return mask[None, None]
