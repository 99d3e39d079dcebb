"""What a tier has to do: keep the bytes of blocks. It knows nothing of sequences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_core.interfaces import Closing, TierBytes


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of what a store keeps. `device` is where attention computes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    block_size: int = 256
    """Tokens per block."""

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """[2, G, block_size, D]: keys, then values, head-major."""
        return 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize


class BlockStorage(Closing):
    """Keeps the bytes of blocks, which it names by a number within a layer.

    A block is filled through a *tail*, a tensor [2, G, block_size, D], and sealed when it is full.
    Where blocks are in memory, a block's tail is the block itself. A table holds at most one tail.
    """

    @abstractmethod
    def growth(self, num_blocks: Mapping[int, int], num_tails: int) -> TierBytes:
        """What `allocate` would take."""

    @abstractmethod
    def allocate(self, num_blocks: Mapping[int, int], num_tails: int) -> dict[int, list[int]]:
        """New blocks by layer, and room for `num_tails` calls of `open`.

        Raises DoesNotFitError with nothing changed.
        """

    @abstractmethod
    def free(self, layer_idx: int, blocks: Sequence[int]) -> None:
        """Give back blocks, written or not."""

    @abstractmethod
    def open(self, block: int) -> Tensor:
        """A tail for `block`, its content undefined. `allocate` has made the room."""

    @abstractmethod
    def drop(self, tail: Tensor) -> None:
        """Give back the room of a tail."""

    @abstractmethod
    def seal(self, layer_idx: int, block: int, tail: Tensor) -> Tensor | None:
        """Keep a full tail as `block`. Returns the tail to go on with, or None if the next block
        brings its own.
        """

    @abstractmethod
    def load(self, layer_idx: int, block: int, tail: Tensor) -> None:
        """Copy a sealed block into the tail of another. Raises ReadError."""

    @abstractmethod
    def unseal(self, layer_idx: int, block: int, tail: Tensor) -> None:
        """Make `tail`, which `open(block)` could have given, hold what was sealed, to seal it
        again. Raises ReadError.
        """

    @abstractmethod
    def read(self, layer_idx: int, blocks: Sequence[int]) -> Iterator[Tensor]:
        """Sealed blocks, [2, G, block_size, D] each, valid until the next step. Raises
        ReadError.
        """

    def check(self) -> None:
        """Raise what a write in the background met."""
        return

    @abstractmethod
    def tier_bytes(self) -> TierBytes:
        """Bytes held now, per tier."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk since opening."""
        return 0
