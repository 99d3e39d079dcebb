"""The part of a HybridKVStore for keys and values, where no layer of the model has any."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from torch import Tensor

from ollm_core.contracts.kv import KVGeometry, KVStore, TierBytes
from ollm_core.errors import KVStoreError


class NoKeysStore(KVStore):
    """Numbers sequences and holds nothing: how many tokens these have, their states say."""

    def __init__(self, geometry: KVGeometry) -> None:
        self.block_size = geometry.block_size
        self._numbers = itertools.count()

    def new_sequence(self) -> int:
        return next(self._numbers)

    def growth_bytes(self, sequence: int, num_tokens: int, longest: int | None = None) -> TierBytes:
        return TierBytes()

    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        """Nothing to reserve."""

    def commit(self, sequence: int) -> None:
        """Nothing to keep."""

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        raise KVStoreError("no layer of this model has keys and values")

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        raise KVStoreError("no layer of this model has keys and values")

    def advance(self, sequence: int, num_tokens: int, longest: int) -> None:
        """For a dry run: nothing grows."""

    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        """As many as the states have."""
        return sys.maxsize

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Nothing to cut."""

    def can_truncate(self, sequence: int, num_tokens: int) -> bool:
        return True

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        return self.new_sequence()

    def release(self, sequence: int) -> None:
        """Nothing to free."""

    def tier_bytes(self) -> TierBytes:
        return TierBytes()

    @property
    def bytes_read(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is open."""
