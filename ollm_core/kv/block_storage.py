"""BlockStorage, the base class of KV tiers: keeps the bytes of blocks, and knows nothing of
sequences.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import TierBytes


class BlockStorage(Closing):
    """Keeps the bytes of blocks, which it names by a number within a layer.

    A block is filled through a *tail*, a tensor [2, G, block_size, D], and sealed when it is full.
    Where blocks are in memory, a block's tail is the block itself. A table holds at most one tail.
    """

    in_place = False
    """Whether `read` gives out the blocks themselves."""

    @abstractmethod
    def growth(self, num_blocks: Mapping[int, int], tails: Collection[int]) -> TierBytes:
        """What `allocate` would take."""

    @abstractmethod
    def allocate(
        self, num_blocks: Mapping[int, int], tails: Collection[int]
    ) -> dict[int, list[int]]:
        """New blocks by layer, and room for a call of `open` for each layer in `tails`.

        Raises DoesNotFitError with nothing changed.
        """

    @abstractmethod
    def free(self, layer_idx: int, blocks: Sequence[int]) -> None:
        """Give back blocks, written or not."""

    @abstractmethod
    def clear(self, layer_idx: int, blocks: Sequence[int]) -> None:
        """Forget what blocks hold, but keep them, to be filled again."""

    @abstractmethod
    def open(self, layer_idx: int, block: int) -> Tensor:
        """A tail for `block`, its content undefined. `allocate` has made the room."""

    @abstractmethod
    def drop(self, layer_idx: int) -> None:
        """Give back the room of a tail, opened or not."""

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

    def read_runs(self, layer_idx: int, blocks: Sequence[int]) -> Iterator[Tensor] | None:
        """As `read`, but [B, 2, G, block_size, D], where blocks lie side by side. None, as by
        default, if they never do.
        """
        return None

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
