"""What stands for caches and stores while a layer is traced: no data, and nothing kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ollm_core.attention.blockwise import most_blocks
from ollm_core.attention.select import find_attention
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import KVGeometry, KVStore, SharedRun


@dataclass(frozen=True, slots=True)
class Sharing:
    """What of the stored blocks of a call's rows is read once for several of them, as far as that
    decides what the call takes.
    """

    runs: tuple[tuple[int, ...], ...] = ()
    """Rows of each run. Where all are equally long, first those that share at all, who have no
    block by that, then each number of rows that there is.
    """
    lengths: tuple[int, ...] = ()
    """Of packed rows."""
    num_own: int = 0
    """Tokens stored of a row that it does not share, at most."""


APART = Sharing()
"""Nothing of them."""


class TracedCache:
    """Stands for the cache of a layer: hands out blocks without data."""

    in_place = False  # what is seen may have to be put together

    def __init__(
        self,
        geometry: KVGeometry,
        num_tokens: int,
        attention: str,
        sharing: Sharing = APART,
    ) -> None:
        """`num_tokens` are those that a row does not share."""
        self._geometry = geometry
        self._num_tokens = num_tokens
        self._attention = attention
        self._sharing = sharing
        self._runs: list[SharedRun] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[KVView, KVView]:
        packed = self._sharing.lengths
        lengths = packed or (keys.shape[2],) * keys.shape[0]
        starts = [0] * len(lengths)
        self._runs.clear()
        for number, rows in enumerate(self._sharing.runs):
            # Before its own, a row has in each of its runs as many blocks as matter.
            first = max(starts[row] for row in rows)
            most = most_blocks(sum(lengths[row] for row in rows)) if number or packed else 0
            end = first + most * self._geometry.block_size
            self._runs.append(SharedRun(rows, first, end))
            for row in rows:
                starts[row] = end
        view = KVView(
            keys,
            values,
            layer_idx,
            (0,) * len(lengths),
            tuple(start + self._num_tokens for start in starts),
            cast("KVStore", self),  # nothing else is asked of it
            find_attention(self._attention, self._geometry.device),
            lengths=packed,
        )
        return view, view

    def shared_runs(
        self, layer_idx: int, sequences: Sequence[int], ends: Sequence[int]
    ) -> Sequence[SharedRun]:
        return self._runs

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        shape = self._geometry.block_shape(layer_idx)
        block = torch.empty(shape, dtype=self._geometry.dtype, device="meta")
        end = self._num_tokens if num_tokens is None else num_tokens
        for begin in range(first, end, self._geometry.block_size):
            count = min(self._geometry.block_size, end - begin)
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
