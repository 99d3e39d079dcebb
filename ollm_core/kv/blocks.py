"""The block table: which blocks each sequence has, shared between forks, the same for every tier.

Tokens collect in a tail, one open block per layer and sequence. A full tail is sealed: from then
on it never changes, so that forks can share it, and the tier may put it where it likes.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ollm_core.errors import KVStoreError
from ollm_core.interfaces import Closing, KVStore, TierBytes


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of what is stored, and the device that computes with it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    block_size: int = 256
    """Tokens per block."""

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Keys then values, head-major: [2, G, block_size, D]."""
        return 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return torch.Size(self.block_shape).numel() * self.dtype.itemsize

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks per layer that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)


class BlockStorage(Closing):
    """One tier: memory for tails, a place for sealed blocks, and the account of both.

    Space is taken before it is used: `take` covers as many open or sealed blocks in a layer.
    """

    @abstractmethod
    def cost(self, num_blocks: int, num_tails: int) -> TierBytes:
        """Bytes that `take` asks for, over all layers together."""

    @abstractmethod
    def take(self, blocks_per_layer: Sequence[int], num_tails: int) -> None:
        """Set space aside. Raises DoesNotFitError with nothing changed."""

    @abstractmethod
    def give(self, blocks_per_layer: Sequence[int], num_tails: int) -> None:
        """Return space that was taken."""

    @abstractmethod
    def open_tail(self) -> Tensor:
        """A block to be filled, contents arbitrary."""

    @abstractmethod
    def drop_tail(self, tail: Tensor) -> None:
        """Take back a tail that is not sealed."""

    @abstractmethod
    def seal(self, layer_idx: int, tail: Tensor) -> object:
        """Make a full tail immutable; the handle is what `read` and `free` want."""

    @abstractmethod
    def read(self, layer_idx: int, handles: Sequence[object]) -> Iterator[Tensor]:
        """Sealed blocks in order, on the compute device, each valid until the next step."""

    @abstractmethod
    def free(self, layer_idx: int, handle: object) -> None:
        """Forget a sealed block."""

    @abstractmethod
    def tier_bytes(self) -> TierBytes:
        """Bytes held now."""

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk since opening."""
        return 0


@dataclass(eq=False, slots=True)
class _Block:
    """A sealed block and how many sequences have it."""

    handle: object
    num_users: int = 1


@dataclass(eq=False, slots=True)
class _Layer:
    """What one layer of a sequence has."""

    blocks: list[_Block] = field(default_factory=list)
    tail: Tensor | None = None
    num_in_tail: int = 0


@dataclass(eq=False, slots=True)
class _Sequence:
    layers: list[_Layer]
    capacity: int = 0
    """Blocks per layer for which there is space, those in use included."""


class BlockKVStore(KVStore):
    """See KVStore. Everything but the tier."""

    def __init__(self, geometry: KVGeometry, storage: BlockStorage) -> None:
        self.geometry = geometry
        self.block_size = geometry.block_size
        self._storage = storage
        self._sequences: dict[int, _Sequence] = {}
        self._ids = itertools.count()
        self._closed = False

    def new_sequence(self) -> int:
        if self._closed:
            raise KVStoreError("the KV store is closed")
        sequence = next(self._ids)
        self._sequences[sequence] = _Sequence([_Layer() for _ in range(self.geometry.num_layers)])
        return sequence

    def growth_bytes(self, sequence: int, num_tokens: int) -> TierBytes:
        """What `reserve` with the same arguments would take of each tier."""
        missing, num_tails = self._missing(sequence, num_tokens)
        return self._storage.cost(missing * self.geometry.num_layers, num_tails)

    def reserve(self, sequence: int, num_tokens: int) -> None:
        missing, num_tails = self._missing(sequence, num_tokens)
        if missing:
            self._storage.take([missing] * self.geometry.num_layers, num_tails)
            self._sequences[sequence].capacity += missing

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        layer = self._layer(layer_idx, sequence)
        num_new = keys.shape[1]
        self._check(keys, values)
        self.reserve(sequence, self._length(layer) + num_new)
        done = 0
        while done < num_new:
            if layer.tail is None:
                layer.tail = self._storage.open_tail()
            count = min(self.block_size - layer.num_in_tail, num_new - done)
            place = slice(layer.num_in_tail, layer.num_in_tail + count)
            layer.tail[0, :, place] = keys[:, done : done + count]
            layer.tail[1, :, place] = values[:, done : done + count]
            layer.num_in_tail += count
            done += count
            if layer.num_in_tail == self.block_size:
                layer.blocks.append(_Block(self._storage.seal(layer_idx, layer.tail)))
                layer.tail, layer.num_in_tail = None, 0

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        layer = self._layer(layer_idx, sequence)
        length = self._length(layer)
        left = length if num_tokens is None else num_tokens
        if left > length:
            raise KVStoreError(f"the KV store has {length} tokens; {left} were asked for")
        num_sealed = min(self.geometry.num_blocks(left), len(layer.blocks))
        handles = [block.handle for block in layer.blocks[:num_sealed]]
        for block in self._storage.read(layer_idx, handles):
            count = min(left, self.block_size)
            yield block[0, :, :count], block[1, :, :count]
            left -= count
        if left and layer.tail is not None:
            tail = layer.tail[:, :, :left].to(self.geometry.device)
            yield tail[0], tail[1]

    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        if layer_idx is not None:
            return self._length(self._layer(layer_idx, sequence))
        return min(self._length(layer) for layer in self._get(sequence).layers)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        found = self._get(sequence)
        shortest = min(self._length(layer) for layer in found.layers)
        if num_tokens > shortest or num_tokens < 0:
            raise KVStoreError(
                f"the KV store has {shortest} tokens; cannot truncate to {num_tokens}",
                hint=f"num_tokens must be from 0 to {shortest}",
            )
        capacity = self.geometry.num_blocks(num_tokens)
        for layer_idx, layer in enumerate(found.layers):
            self._truncate_layer(layer_idx, layer, num_tokens, found.capacity)
        if capacity == 0 and found.capacity:
            self._storage.give([0] * len(found.layers), len(found.layers))
        found.capacity = capacity

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        source = self._get(sequence)
        length = self.num_tokens(sequence) if num_tokens is None else num_tokens
        if length > self.num_tokens(sequence):
            raise KVStoreError(
                f"the KV store has {self.num_tokens(sequence)} tokens; cannot fork at {length}"
            )
        num_shared, rest = divmod(length, self.block_size)
        num_layers = self.geometry.num_layers
        if length:
            self._storage.take([1 if rest else 0] * num_layers, num_layers)
        fork = self.new_sequence()
        target = self._sequences[fork]
        target.capacity = self.geometry.num_blocks(length)
        for layer_idx, (old, new) in enumerate(zip(source.layers, target.layers, strict=True)):
            new.blocks = old.blocks[:num_shared]
            for block in new.blocks:
                block.num_users += 1
            if rest:
                self._open_with(layer_idx, new, self._content(layer_idx, old, num_shared), rest)
        return fork

    def release(self, sequence: int) -> None:
        if sequence in self._sequences:
            self.truncate(sequence, 0)
            del self._sequences[sequence]

    def tier_bytes(self) -> TierBytes:
        return self._storage.tier_bytes()

    @property
    def bytes_read(self) -> int:
        return self._storage.bytes_read

    def close(self) -> None:
        for sequence in list(self._sequences):
            self.release(sequence)
        self._closed = True
        self._storage.close()

    def _truncate_layer(
        self, layer_idx: int, layer: _Layer, num_tokens: int, capacity: int
    ) -> None:
        num_full, rest = divmod(num_tokens, self.block_size)
        spare = capacity - len(layer.blocks)  # space taken for the tail and for growth
        reopened: Tensor | None = None
        if num_full < len(layer.blocks):
            if rest:
                reopened = self._content(layer_idx, layer, num_full)
            if layer.tail is not None:
                self._storage.drop_tail(layer.tail)
            layer.tail, layer.num_in_tail = None, 0
            for block in layer.blocks[num_full:]:
                self._drop(layer_idx, block)
            del layer.blocks[num_full:]
        elif not rest and layer.tail is not None:
            self._storage.drop_tail(layer.tail)
            layer.tail, layer.num_in_tail = None, 0
        change = spare - (1 if rest else 0)
        if change >= 0:
            self._storage.give(self._only(layer_idx, change), 0)
        else:
            self._storage.take(self._only(layer_idx, -change), 0)
        if reopened is not None:
            self._open_with(layer_idx, layer, reopened, rest)
        layer.num_in_tail = rest

    def _content(self, layer_idx: int, layer: _Layer, block_idx: int) -> Tensor:
        """A copy of one block, sealed or open."""
        if block_idx == len(layer.blocks):
            assert layer.tail is not None, "a layer with more tokens than full blocks has a tail"
            return layer.tail
        (block,) = (
            b.clone() for b in self._storage.read(layer_idx, [layer.blocks[block_idx].handle])
        )
        return block

    def _open_with(self, layer_idx: int, layer: _Layer, content: Tensor, num_tokens: int) -> None:
        layer.tail = self._storage.open_tail()
        layer.tail[:, :, :num_tokens] = content[:, :, :num_tokens]
        layer.num_in_tail = num_tokens

    def _drop(self, layer_idx: int, block: _Block) -> None:
        block.num_users -= 1
        if block.num_users == 0:
            self._storage.free(layer_idx, block.handle)
            self._storage.give(self._only(layer_idx, 1), 0)

    def _only(self, layer_idx: int, num_blocks: int) -> list[int]:
        counts = [0] * self.geometry.num_layers
        counts[layer_idx] = num_blocks
        return counts

    def _missing(self, sequence: int, num_tokens: int) -> tuple[int, int]:
        """Blocks per layer, and tails, for which there is no space yet."""
        found = self._get(sequence)
        missing = max(self.geometry.num_blocks(num_tokens) - found.capacity, 0)
        return missing, len(found.layers) if missing and not found.capacity else 0

    def _length(self, layer: _Layer) -> int:
        return len(layer.blocks) * self.block_size + layer.num_in_tail

    def _get(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            state = "is closed" if self._closed else f"has no sequence {sequence}"
            raise KVStoreError(f"the KV store {state}")
        return self._sequences[sequence]

    def _layer(self, layer_idx: int, sequence: int) -> _Layer:
        return self._get(sequence).layers[layer_idx]

    def _check(self, keys: Tensor, values: Tensor) -> None:
        geometry = self.geometry
        expected = (geometry.num_kv_heads, keys.shape[1], geometry.head_dim)
        for name, value in (("keys", keys), ("values", values)):
            if tuple(value.shape) != expected or value.dtype != geometry.dtype:
                raise KVStoreError(
                    f"{name} are {value.dtype} {list(value.shape)}, "
                    f"expected {geometry.dtype} {list(expected)}"
                )
