"""Attention strategies, and the name under which transformers' layers find them.

A layer is run with its attention implementation set to `ATTENTION_NAME`. What it gets as keys is a
KVView, which says which strategy to use: nothing is kept in this module, so that models do not see
each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ollm_core.attention.blockwise import (
    BlockwiseAttention,
    blockwise_attention,
    kernels_on,
    most_blocks,
)
from ollm_core.attention.exact import exact_attention
from ollm_core.attention.kernels import Products
from ollm_core.contracts.attention import ATTENTIONS, Attention, KVView
from ollm_core.errors import UnsupportedError

ATTENTION_NAME = "ollm"
"""Unknown to transformers' mask functions, so that no mask is built for it."""
EAGER_NAME = "eager"
"""transformers' own, in the code of each family."""


def find_attention(name: str, device: torch.device, *, caps: bool = False) -> Attention:
    """One of ATTENTIONS, or "products", which is "blockwise" by plain products alone, as it is for
    tensors on `device`, which need not be here: where it is traced, on the meta device, it takes
    the memory that it would take there. `caps`: whether all but "exact" takes soft caps.
    """
    if name == "exact":
        return exact_attention
    if name == "products":
        return BlockwiseAttention((Products(),), caps)
    return BlockwiseAttention(kernels_on(device, package=name == "flash"), caps)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: KVView,
    value: KVView,
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        raise UnsupportedError(
            f"{type(module).__name__} gives attention a mask of its own",
            hint="core's attention sees all earlier tokens, or a window of them",
        )
    if key.store.in_place:
        return key.attention(module, query, key, scaling=scaling, **options), None
    with torch.inference_mode(mode=False):  # a store may keep what is made while it is read
        return key.attention(module, query, key, scaling=scaling, **options), None


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers' registry. May be called any number of times."""
    AttentionInterface.register(ATTENTION_NAME, _attend)


__all__ = [
    "ATTENTIONS",
    "ATTENTION_NAME",
    "EAGER_NAME",
    "blockwise_attention",
    "exact_attention",
    "find_attention",
    "most_blocks",
    "register_attention",
]
