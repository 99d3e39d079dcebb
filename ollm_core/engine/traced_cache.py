"""What stands for caches and stores while a layer is traced: no data, and nothing kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ollm_core.attention.select import find_attention
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import KVGeometry, KVStore


class TracedCache:
    """Stands for the cache of a layer: hands out blocks without data."""

    in_place = False  # what is seen may have to be put together

    def __init__(self, geometry: KVGeometry, num_tokens: int, attention: str) -> None:
        self._geometry = geometry
        self._num_tokens = num_tokens
        self._attention = attention

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[KVView, KVView]:
        num_rows = keys.shape[0]
        view = KVView(
            keys,
            values,
            layer_idx,
            (0,) * num_rows,
            (self._num_tokens,) * num_rows,
            cast("KVStore", self),  # only `blocks` is asked of it
            find_attention(self._attention, self._geometry.device),
        )
        return view, view

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        shape = self._geometry.block_shape(layer_idx)
        block = torch.empty(shape, dtype=self._geometry.dtype, device="meta")
        for begin in range(first, self._num_tokens, self._geometry.block_size):
            count = min(self._geometry.block_size, self._num_tokens - begin)
            yield block[0, :, :count], block[1, :, :count]


class TracedStore(TracedCache):
    """Stands for the store of a model that is run by its own forward."""

    def __init__(self, geometry: KVGeometry, num_tokens: int) -> None:
        super().__init__(geometry, num_tokens, "exact")

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Nothing is kept."""

    def expect(self, sequence: int, num_drafted: int) -> None:
        """Nothing is kept."""

    def state(self, layer_idx: int, sequence: int) -> Sequence[Tensor]:
        return [
            torch.empty(shape, dtype=dtype, device="meta")
            for shape, dtype in self._geometry.state_shapes(layer_idx)
        ]

    def put_state(
        self, layer_idx: int, sequence: int, num_new: int, state: Sequence[Tensor]
    ) -> None:
        """Nothing is kept."""
