"""What a tier has to do: keep the bytes of blocks. It knows nothing of sequences."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import CacheKind, TierBytes
from ollm_core.device.transfer import Bus, bus_of


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of what a store keeps, layer by layer. `device` is where attention computes."""

    kinds: tuple[CacheKind, ...]
    """One per layer."""
    dtype: torch.dtype
    device: torch.device
    block_size: int = 256
    """Tokens per block."""
    bus: Bus | None = field(default=None, compare=False, repr=False)
    """That of `device`, by default as `bus_of` says; None where it computes in host memory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bus", self.bus or bus_of(self.device))

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int = 256,
    ) -> KVGeometry:
        """Layers that all remember every token, in one shape."""
        kind = CacheKind("full", num_kv_heads, head_dim)
        return cls((kind,) * num_layers, dtype, device, block_size)

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def slack(self) -> int:
        """Tokens before its window that a sliding layer keeps as well: so far it can go back."""
        return self.block_size

    def block_shape(self, layer_idx: int) -> tuple[int, int, int, int]:
        """[2, G, block_size, D]: keys, then values, head-major."""
        kind = self.kinds[layer_idx]
        return 2, kind.num_kv_heads, self.block_size, kind.head_dim

    def block_bytes(self, layer_idx: int) -> int:
        """Bytes of one block of a layer."""
        return math.prod(self.block_shape(layer_idx)) * self.dtype.itemsize

    def as_block(self, layer_idx: int, buffer: Tensor) -> Tensor:
        """The start of a byte `buffer` as a block of a layer."""
        part = buffer[: self.block_bytes(layer_idx)]
        return part.view(self.dtype).view(self.block_shape(layer_idx))

    def state_shapes(self, layer_idx: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each tensor of a recurrent layer's state."""
        return tuple(
            (state.shape, torch.float32 if state.float32 else self.dtype)
            for state in self.kinds[layer_idx].states
        )

    def state_bytes(self, layer_idx: int) -> int:
        """Bytes of a recurrent layer's state, of one sequence."""
        return sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in self.state_shapes(layer_idx)
        )

    def attention_layers(self) -> KVGeometry:
        """The same for the layers alone that have keys and values."""
        return replace(self, kinds=tuple(one for one in self.kinds if one.kind != "recurrent"))

    def first_needed(self, layer_idx: int, num_tokens: int) -> int:
        """The first position that a layer must have kept to go on after `num_tokens`. It always
        has the last one, which may be in a block that is not full.
        """
        window = self.kinds[layer_idx].window
        return 0 if window is None else max(num_tokens - max(window - 1, 1), 0)


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
