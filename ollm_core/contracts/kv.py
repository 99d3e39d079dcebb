"""The contracts of keys, values and recurrent states of many sequences."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from ollm_core.contracts.closing import Closing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tier = Literal["device", "host", "disk"]
KV_TIERS = ("device", "host", "disk")
"""Names of the KV stores of core, in the order in which they are tried. kv/tiers.py makes them."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """One tensor of a recurrent state, of one sequence."""

    shape: tuple[int, ...]
    float32: bool = False
    """Whether it is that, whatever the model computes in."""


@dataclass(frozen=True, slots=True)
class CacheKind:
    """What one layer remembers. `window` counts tokens, for "sliding" only."""

    kind: Literal["full", "sliding", "recurrent", "none"] = "full"
    num_kv_heads: int = 0
    head_dim: int = 0
    """Numbers of a key and of a value as they are kept: the longer of the two."""
    window: int | None = None
    states: tuple[StateShape, ...] = ()
    """For "recurrent": the convolution's state [channels, width], then the recurrent one. A layer
    that is run by its model's own forward may have states beside keys and values.
    """
    key_dim: int = 0
    value_dim: int = 0
    """Numbers of a key and of a value where they differ; 0: `head_dim`."""

    @property
    def has_keys(self) -> bool:
        """Whether the layer keeps keys and values."""
        return self.kind in ("full", "sliding")


@dataclass(frozen=True, slots=True)
class TierBytes:
    """Bytes held per tier."""

    device: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of what a store keeps, layer by layer. `device` is where attention computes."""

    kinds: tuple[CacheKind, ...]
    """One per layer."""
    dtype: torch.dtype
    device: torch.device
    block_size: int = 256
    """Tokens per block."""

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
        import torch  # not before: the contracts load without it

        return tuple(
            (state.shape, torch.float32 if state.float32 else self.dtype)
            for state in self.kinds[layer_idx].states
        )

    def state_bytes(self, layer_idx: int) -> int:
        """Bytes of a recurrent layer's state, of one sequence."""
        return sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in self.state_shapes(layer_idx)
        )

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of the blocks and states of one sequence of so many tokens, all its own."""
        found = 0
        for layer_idx, kind in enumerate(self.kinds):
            if kind.has_keys:
                first = self.first_needed(layer_idx, num_tokens) // self.block_size
                num_blocks = -(-num_tokens // self.block_size) - first
                found += num_blocks * self.block_bytes(layer_idx)
            found += self.state_bytes(layer_idx)
        return found

    def attention_layers(self) -> KVGeometry:
        """The same for the layers alone that have keys and values."""
        return replace(self, kinds=tuple(one for one in self.kinds if one.has_keys))

    @property
    def is_plain(self) -> bool:
        """Whether every layer has keys and values, and nothing else."""
        return all(kind.has_keys and not kind.states for kind in self.kinds)

    def first_needed(self, layer_idx: int, num_tokens: int) -> int:
        """The first position that a layer must have kept to go on after `num_tokens`. It always
        has the last one, which may be in a block that is not full.
        """
        window = self.kinds[layer_idx].window
        return 0 if window is None else max(num_tokens - max(window - 1, 1), 0)


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Neighbouring positions that several sequences have in the same blocks."""

    rows: tuple[int, ...]
    """Two or more places in the list of sequences that was asked about."""
    first: int
    end: int
    """Positions `first` to `end`, multiples of the block size."""


class TiledBlocks(ABC, Iterator["tuple[Tensor, Tensor]"]):
    """What `KVStore.blocks` may give out where blocks of one length lie side by side: they can be
    taken together. A store that changes or checks what another's `blocks` gives needs not know.
    """

    @abstractmethod
    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same blocks in the same order, in place of them, as pairs of [B, G, n, D], each valid
        until the next step. To be asked for before the first step.
        """


class KVStore(Closing):
    """Keys and values of every layer for any number of sequences, stored per KV head, never
    repeated to query heads.

    A sequence's layers fill one after another during a weight pass; `num_tokens(sequence)` counts
    the tokens that every layer has. Not thread-safe: one weight pass at a time.
    """

    block_size: int
    """Tokens per block, the unit of allocation."""

    @abstractmethod
    def new_sequence(self) -> int:
        """A fresh, empty sequence."""

    @abstractmethod
    def growth_bytes(self, sequence: int, num_tokens: int, longest: int | None = None) -> TierBytes:
        """What `reserve` would take of each memory beyond what is held or reserved already. A pass
        is refused by it before anything runs.
        """

    @abstractmethod
    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        """Make sure that `sequence` can grow to `num_tokens` in every layer, by at most `longest`
        (default: all) in one `append`. Until `commit`, it can be truncated to its length now, which
        gives back all that was reserved and not used.

        Raises DoesNotFitError, with nothing changed, if memory or disk does not allow it.
        """

    def commit(self, sequence: int) -> None:
        """A pass has succeeded: what was kept only to undo it may go. By default nothing does."""
        return

    @abstractmethod
    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Store `keys` and `values`, each [G, T, D] in the store's dtype, after what this layer
        has.
        """

    @abstractmethod
    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of positions `first` to `num_tokens` (default: all) in order, as pairs of
        [G, n, D].

        They are on the compute device and valid until the next step of the iterator, which may be
        a TiledBlocks. Raises KVStoreError for positions that a sliding layer no longer has.
        """

    def shared_runs(
        self, layer_idx: int, sequences: Sequence[int], ends: Sequence[int]
    ) -> Sequence[SharedRun]:
        """Which positions before `ends`, one of each of `sequences`, several of these have in the
        same blocks: what `blocks` gives of one is then read once for all of them. By default none.

        As a tree: the rows of two runs are apart, or the one that comes first has all of the
        other's and ends at or before its `first`. So no position of a row is in two runs, and a
        row's runs, in their order, begin at 0 and leave nothing out.
        """
        return ()

    @property
    def in_place(self) -> bool:
        """Whether what `blocks` gives out are views of what is kept, all valid until the store next
        changes. By default it is not.

        `append` and `blocks` are then called in inference mode, which must not mark what is kept.
        """
        return False

    @abstractmethod
    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        """Tokens stored in `layer_idx`, or, by default, in every layer."""

    @abstractmethod
    def truncate(self, sequence: int, num_tokens: int) -> None:
        """Drop positions >= `num_tokens` from every layer, and what `reserve` took for more: also
        where there are no such positions. Idempotent. Raises KVStoreError, with nothing changed, if
        a layer has fewer, or slides and has let go of what it would need.
        """

    def can_truncate(self, sequence: int, num_tokens: int) -> bool:
        """Whether `truncate` would do it: what cuts several sequences asks for all of them first.
        By default it would.
        """
        return True

    @abstractmethod
    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        """A new sequence that shares the first `num_tokens` (default: all). Neither sees what the
        other adds.
        """

    @abstractmethod
    def release(self, sequence: int) -> None:
        """Forget a sequence and free what only it used. Unknown sequences are ignored."""

    @abstractmethod
    def tier_bytes(self) -> TierBytes:
        """Bytes held now, per tier."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """KV bytes read from disk since opening."""


@runtime_checkable
class KeepsPrefixes(Protocol):
    """What a KVStore may be able to do beside: keep what its sequences hold when it is closed, and
    find it again in another store, by token ids.
    """

    def find(self, token_ids: Tensor) -> tuple[int, int]:
        """A new sequence that begins with the longest kept prefix of `token_ids` [T], and how many
        tokens it has; 0 if nothing is found. Damage of what is kept is not found, or raises
        DamagedKVError when it is read; it is then not found again.
        """

    def keep(self, sequence: int, start: int, token_ids: Tensor) -> None:
        """Say which tokens `sequence` holds from `start` on. Without it they are not kept. What
        fails is logged, never raised.
        """


@runtime_checkable
class KeepsStates(Protocol):
    """What a KVStore does beside for layers with a recurrent state, which is not one of keys and
    values and cannot be cut: each sequence can go back to the start of its last pass, and to before
    each of the pass's drafted tokens.
    """

    def expect(self, sequence: int, num_drafted: int) -> None:
        """Said before `reserve`: how many of the next pass's last tokens are drafted."""

    def state(self, layer_idx: int, sequence: int) -> Sequence[Tensor] | None:
        """The layer's state after all tokens that it has, each of its `CacheKind.states`, valid
        until the next call for that layer. None before the first token.
        """

    def put_state(
        self, layer_idx: int, sequence: int, num_new: int, state: Sequence[Tensor]
    ) -> None:
        """Store a copy of the state after `num_new` more tokens. Raises KVStoreError for another
        shape or dtype.
        """


class Checkpoint(Protocol):
    """What is written of one pass while it runs, so that another process can go on with it."""

    @property
    def num_done(self) -> int:
        """Layers of the model that `restore` brings back; 0: nothing was found, or written."""

    def restore(self, hidden: list[Tensor]) -> None:
        """Give the store what the layers done have added, and put the hidden states after them in
        place of `hidden`, which have their shapes. To be called once, before any layer, if
        `num_done`. Raises ReadError or DamagedKVError: nothing is found the next time.
        """

    def save(self, num_done: int, hidden: Sequence[Tensor]) -> bool:
        """Write `hidden`, each contiguous, and what `num_done` layers have added to the store, in
        place of what was written before; returns whether it was. What fails is logged, never
        raised.
        """

    def finish(self) -> None:
        """The pass is through and committed: forget what was written, as soon as the store has
        kept the tokens or is told of another pass.
        """

    def drop(self) -> None:
        """Forget what was written: it is of no use."""


@runtime_checkable
class KeepsCheckpoints(Protocol):
    """What a KVStore with KeepsPrefixes may be able to do beside: keep a pass that is broken off.
    `find` then gives the beginning after which such a pass can be gone on with.
    """

    def checkpoint(
        self,
        sequence: int,
        token_ids: Tensor,
        settings: Mapping[str, Any],
        dtypes: Collection[torch.dtype],
    ) -> Checkpoint | None:
        """The checkpoint of a pass that has been reserved, over `token_ids` [T] after what the
        sequence has; None if it cannot be kept. What was written by a pass over other tokens or
        with other `settings`, JSON values that say all that its bits depend on beside the model,
        is not found. `dtypes` are those that hidden states may have.
        """
