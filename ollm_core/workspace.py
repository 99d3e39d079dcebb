"""How much memory one chunk takes on its way through a layer: traced on the meta device, so exact
and quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from ollm_core.attention import ATTENTIONS
from ollm_core.interfaces import KVStore, KVView
from ollm_core.kv import KVGeometry
from ollm_core.skeleton import Skeleton
from ollm_core.tracing import traced_peak

_BLOCKWISE_BLOCKS = 2  # block-wise attention takes as much for two earlier blocks as for any number


class Workspace:
    """Answers "how many bytes" for the layers of one model. Results are remembered by shape."""

    def __init__(self, skeleton: Skeleton, geometry: KVGeometry) -> None:
        self._skeleton = skeleton
        self._geometry = geometry
        self._known: dict[tuple[int, int, int, str], int] = {}

    def layer_bytes(self, num_rows: int, num_new: int, num_past: int, attention: str) -> int:
        """Peak bytes of a layer for `num_new` tokens in each of `num_rows`, after `num_past`
        tokens.

        The layer's output is counted, its input and its weights are not.
        """
        num_blocks = -(-num_past // self._geometry.block_size)
        if attention == "blockwise":
            num_blocks = min(num_blocks, _BLOCKWISE_BLOCKS)
        key = num_rows, num_new, num_blocks, attention
        if key not in self._known:
            self._known[key] = self._trace(num_rows, num_new, num_blocks, attention)
        return self._known[key]

    def _trace(self, num_rows: int, num_new: int, num_blocks: int, attention: str) -> int:
        hidden_size: int = self._skeleton.config.hidden_size
        hidden = torch.empty(
            num_rows, num_new, hidden_size, dtype=self._geometry.dtype, device="meta"
        )
        cache = _TracedCache(self._geometry, num_blocks, attention)

        def run() -> Tensor:
            positions = torch.arange(num_new, device="meta").expand(num_rows, num_new)
            embeddings = self._skeleton.meta_rotary(hidden, positions)
            output: Tensor = self._skeleton.layers[0](
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=embeddings,
            )
            return output

        return traced_peak(run)


class _TracedCache:
    """Stands for the cache of a layer: hands out blocks without data."""

    def __init__(self, geometry: KVGeometry, num_blocks: int, attention: str) -> None:
        self._num_blocks = num_blocks
        self._num_tokens = num_blocks * geometry.block_size
        self._attention = attention
        self._block = torch.empty(geometry.block_shape, dtype=geometry.dtype, device="meta")

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[KVView, KVView]:
        num_rows = keys.shape[0]
        view = KVView(
            keys,
            values,
            layer_idx,
            (0,) * num_rows,
            (self._num_tokens,) * num_rows,
            cast("KVStore", self),  # only `blocks` is asked of it
            ATTENTIONS[self._attention],
        )
        return view, view

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self._num_blocks):
            yield self._block[0], self._block[1]
