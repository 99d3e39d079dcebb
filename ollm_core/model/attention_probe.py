"""Compares core's block-wise attention with what a family calls where attention is eager, with all
that an attention module hands on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ollm_core.attention.exact import family_eager
from ollm_core.attention.own_layer import OwnLayerAttention
from ollm_core.attention.select import find_attention
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import KVStore
from ollm_core.model.layer_memory import LayerMemory
from ollm_core.model.mask_probe import NotSeen

_LARGEST_ERRORS = {1.0: 1e-4, 100.0: 1e-2}
"""Of an output of the size of 1, by the size of the scores: soft caps show in large ones."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One call of an attention function."""

    module: nn.Module
    query_shape: tuple[int, ...]
    """[R, H, T, K]."""
    scaling: float
    options: Mapping[str, Any]

    def compare(self, memory: LayerMemory) -> None:
        """Raises NotSeen unless the family's eager function and core's give the same numbers."""
        random, parameters = torch.Generator().manual_seed(0), _Parameters()
        options = {name: parameters.of(value) for name, value in self.options.items()}
        module = cast("nn.Module", _Shown(self.module, parameters))
        _, num_heads, _, key_dim = self.query_shape
        num_past, num_new = 6, 3
        value_dim = memory.kind.value_dim or memory.kind.head_dim
        query = torch.randn(1, num_heads, num_new, key_dim, generator=random)
        keys, values = (
            torch.randn(1, memory.heads, num_past + num_new, size, generator=random)
            for size in (key_dim, value_dim)
        )
        mask = torch.full((num_new, num_past + num_new), torch.finfo().min).triu(num_past + 1)
        stored_keys, stored_values = memory.pack(keys, values, None)
        past, new = slice(0, num_past), slice(num_past, None)
        view = KVView(
            stored_keys[:, :, new],
            stored_values[:, :, new],
            0,
            (0,),
            (num_past,),
            cast("KVStore", OneBlock(stored_keys[0, :, past], stored_values[0, :, past])),
            find_attention("blockwise", _CPU, caps=True),
        )
        attend = OwnLayerAttention(view.attention, None, value_dim)
        for size, most in _LARGEST_ERRORS.items():
            asked = query * (size / (self.scaling * key_dim**0.5))
            expected = family_eager(self.module)(
                module, asked, keys, values, mask[None, None], scaling=self.scaling, **options
            )[0]
            found = attend(self.module, asked, view, scaling=self.scaling, **options)
            if found.shape != expected.shape or not (found - expected).abs().max() <= most:
                raise NotSeen(
                    f"the eager attention of {type(self.module).__name__} gives other numbers"
                )


class OneBlock:
    """Stands for a store with one block."""

    in_place = True

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._block = keys, values

    def blocks(self, *_: object) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._block


class _Parameters:
    """Random numbers for parameters without data, the same ones for the same parameter."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}
        self._random = torch.Generator().manual_seed(1)

    def of(self, value: Any) -> Any:
        """`value`, or numbers for it."""
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = torch.randn(value.shape, generator=self._random)
        return self._made[id(value)]


class _Shown:
    """A module as its eager attention sees it, with numbers for its parameters."""

    def __init__(self, module: nn.Module, parameters: _Parameters) -> None:
        self._module = module
        self._parameters = parameters

    def __getattr__(self, name: str) -> Any:
        return self._parameters.of(getattr(self._module, name))
