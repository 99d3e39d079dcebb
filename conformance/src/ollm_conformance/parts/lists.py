"""The plain model of a KV store: a tensor for each layer of each sequence, copied at every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_conformance.seeds import drawn
from ollm_core import CacheKind, KVStore, KVStoreError, TierBytes


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a store is to keep."""

    num_layers: int = 2
    num_kv_heads: int = 3
    head_dim: int = 5
    dtype: torch.dtype = torch.float32
    block_size: int = 4
    """Tokens per block."""
    windows: tuple[int | None, ...] = ()
    """Per layer: how many tokens it may see, the one that looks included; None: all before it.
    Empty: None for each layer.
    """

    @property
    def kinds(self) -> tuple[CacheKind, ...]:
        """What each layer remembers, as a `KVGeometry` takes it."""
        return tuple(
            CacheKind(
                "full" if window is None else "sliding", self.num_kv_heads, self.head_dim, window
            )
            for window in self.windows or (None,) * self.num_layers
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer: keys and values, once per KV head."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def random(self, num_tokens: int, seed: int) -> Tensor:
        """Random keys and values [2, G, T, D]."""
        generator = drawn(seed)
        shape = 2, self.num_kv_heads, num_tokens, self.head_dim
        return torch.randn(shape, generator=generator).to(self.dtype)

    def join(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """What `KVStore.blocks` gives, copied, as [2, G, S, D]."""
        parts = [torch.stack(pair) for pair in pairs]
        return torch.cat([self.random(0, 0), *parts], dim=2)


class ListKVStore(KVStore):
    """Right and slow: keeps plain tensors in memory, counts nothing."""

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self.block_size = shape.block_size
        self.layers: dict[int, list[Tensor]] = {}
        """Sequence to the keys and values [2, G, S, D] of each layer."""
        self._next = 0

    def new_sequence(self) -> int:
        sequence, self._next = self._next, self._next + 1
        self.layers[sequence] = [self.shape.random(0, 0)] * self.shape.num_layers
        return sequence

    def growth_bytes(self, sequence: int, num_tokens: int, longest: int | None = None) -> TierBytes:
        """Nothing: see `reserve`."""
        return TierBytes()

    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        """Nothing to do: memory has no end here."""

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        layers = self.layers[sequence]
        layers[layer_idx] = torch.cat([layers[layer_idx], torch.stack([keys, values])], dim=2)

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See KVStore. Starts at `first`, in the middle of a block if it is there."""
        kept = self.layers[sequence][layer_idx]
        end = kept.shape[2] if num_tokens is None else num_tokens
        while first < end:
            last = min(end, (first // self.block_size + 1) * self.block_size)
            yield kept[0, :, first:last], kept[1, :, first:last]
            first = last

    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        layers = self.layers[sequence]
        return min(t.shape[2] for t in (layers if layer_idx is None else [layers[layer_idx]]))

    def truncate(self, sequence: int, num_tokens: int) -> None:
        if not 0 <= num_tokens <= self.num_tokens(sequence):
            raise KVStoreError(f"there are {self.num_tokens(sequence)} tokens, not {num_tokens}")
        self.layers[sequence] = [t[:, :, :num_tokens] for t in self.layers[sequence]]

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        end = self.num_tokens(sequence) if num_tokens is None else num_tokens
        forked = self.new_sequence()
        self.layers[forked] = [t[:, :, :end] for t in self.layers[sequence]]
        return forked

    def release(self, sequence: int) -> None:
        self.layers.pop(sequence, None)

    def tier_bytes(self) -> TierBytes:
        return TierBytes()

    @property
    def bytes_read(self) -> int:
        return 0

    def close(self) -> None:
        self.layers.clear()
