"""One chunk's calls of layers that get what the model's own forward gives them, and transformers'
own cache with their past laid out in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ollm_core.contracts.kv import CacheKind, KeepsStates, KVStore
from ollm_core.errors import UnsupportedError
from ollm_core.model.layer_memory import pretend
from ollm_core.model.own_forward import LayerArguments, OwnForward

Embed = Callable[[Tensor], Tensor]
"""Token ids [N] -> rows of the embedding, [N, C]."""


class OwnCall:
    """One chunk's call of every layer of a model that is run by its own forward: rows that have
    equally many tokens before it.
    """

    def __init__(
        self,
        own: OwnForward,
        store: KVStore,
        sequences: Sequence[int],
        ids: Tensor,
        start: int,
        embed: Embed,
        *,
        alone: bool,
    ) -> None:
        """`ids` [R, T] come after `start` tokens of each of `sequences`. `alone`: there is no other
        chunk, so what layers are called with may be kept from one to the next.
        """
        self._own = own
        self._store = store
        self._sequences = tuple(sequences)
        self._ids = ids
        self._start = start
        self._embed = embed
        self._alone = alone
        self._arguments: list[LayerArguments] = []
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        self._positions = positions.expand(ids.shape[0], -1)
        self._cache = LaidOutCache(own, store, self._sequences, start)

    def enter(self) -> Tensor:
        """Hidden states before the first layer, [R, T, C]."""
        with torch.inference_mode():
            rows = self._embed(self._ids.flatten())
            self._cache.rewind()
            hidden, found = self._own.enter(
                self._ids, self._positions, rows, self._cache, -1 if self._alone else 0
            )
            if self._alone:
                self._arguments = found
            return hidden

    def run(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Run a layer: [R, T, C] -> the same."""
        with torch.inference_mode():
            if self._alone:
                arguments = self._arguments[layer_idx]
            else:
                self._cache.rewind()
                rows = self._rows(hidden)
                arguments = self._own.enter(
                    self._ids, self._positions, rows, self._cache, layer_idx
                )[1][layer_idx]  # what others are called with is not kept
                del rows
            with self._cache.laid_out(layer_idx, hidden, self._ids.shape[1]):
                return self._own.call(layer_idx, hidden, arguments)

    def leave(self, hidden: Tensor, num_logits: int) -> Tensor:
        """Logits [R, n, V] at the last positions."""
        with torch.inference_mode():
            self._cache.rewind()
            return self._own.leave(
                self._ids, self._positions, self._rows(hidden), self._cache, hidden, num_logits
            )

    def _rows(self, hidden: Tensor) -> Tensor:
        """Rows of the embedding; where nothing depends on them, some of the right shape."""
        if self._own.uses_embedding:
            return self._embed(self._ids.flatten())
        nothing = hidden.new_zeros(1, self._own.embedding_size, dtype=self._own.dtype)
        return nothing.expand(self._ids.numel(), -1)


class LaidOutCache(Cache):
    """The cache that transformers makes for a model, which holds the past of one layer at a time:
    for the others it only says how long that is.
    """

    def __init__(
        self,
        own: OwnForward,
        store: KVStore,
        sequences: Sequence[int],
        start: int,
    ) -> None:
        super().__init__(layers=[own.new_layer(i) for i in range(own.num_layers)])
        self._own = own
        self._store = store
        self._sequences = sequences
        self._start = start
        self._layer_idx = -1
        self._new: tuple[Tensor, Tensor] | None = None
        self._new_index: Tensor | None = None
        self._keeping = nullcontext() if store.in_place else torch.inference_mode(mode=False)
        like = torch.empty(0, device=own.device)
        for layer in self.layers:
            pretend(layer, start, len(sequences), like)

    def rewind(self) -> None:
        """Before each run of the model's forward: positions are those before the chunk again."""
        like = torch.empty(0, device=self._own.device)
        for memory, layer in zip(self._own.memories, self.layers, strict=True):
            memory.fill_positions(layer, self._start, len(self._sequences), like)

    def laid_out(self, layer_idx: int, like: Tensor, num_new: int) -> _LaidOut:
        """In the `with`, the past of a layer is here, as tensors `like` hidden states; after it,
        what the layer has added, for `num_new` tokens, is in the store.
        """
        return _LaidOut(self, layer_idx, like, num_new)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See Cache. What is new, [R, G, T, D], is stored."""
        self._check(layer_idx)
        self._new = key_states, value_states
        found: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return found

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """See Cache. What is new, [R, T, I], is stored."""
        self._check(layer_idx)
        self._new_index = indexer_key_states
        found: Tensor = super().update_indexer(indexer_key_states, layer_idx)
        return found

    def _check(self, layer_idx: int) -> None:
        """Raises UnsupportedError for a layer that writes into the cache of another one."""
        if layer_idx != self._layer_idx:
            raise UnsupportedError(
                f"layer {self._layer_idx} writes into the cache of layer {layer_idx}",
                hint="core keeps the past of each layer by itself",
            )

    def begin(self, layer_idx: int, like: Tensor) -> None:
        """Lay the past of a layer out."""
        self._layer_idx = layer_idx
        memory = self._own.memories[layer_idx]
        layer = self._fresh(layer_idx)
        if self._start:
            if memory.kind.has_keys:
                pretend(layer, self._start, len(self._sequences), like)
                memory.fill(layer, *self._past(layer_idx, memory.kind, like))
            if memory.kind.states:
                assert isinstance(self._store, KeepsStates), "such a model has such a store"
                rows = [self._store.state(layer_idx, one) for one in self._sequences]
                states = [torch.stack(same).to(like.device) for same in zip(*rows, strict=True)]
                memory.fill_states(layer, states)

    def end(self, num_new: int) -> None:
        """Store what the layer that was called has added, and its state, and hold nothing of it."""
        layer_idx, memory = self._layer_idx, self._own.memories[self._layer_idx]
        if memory.kind.has_keys:
            if self._new is None:
                raise UnsupportedError(f"layer {layer_idx} does not keep its keys and values")
            keys, values = memory.pack(*self._new, self._new_index)
            with self._keeping:
                for row, sequence in enumerate(self._sequences):
                    self._store.append(layer_idx, sequence, keys[row], values[row])
        if memory.kind.states:
            assert isinstance(self._store, KeepsStates), "such a model has such a store"
            states = memory.states(self.layers[layer_idx])
            for row, sequence in enumerate(self._sequences):
                state = [one[row] for one in states]
                self._store.put_state(layer_idx, sequence, num_new, state)
        self.drop()

    def drop(self) -> None:
        """Hold nothing of the layer that was called."""
        layer_idx, self._layer_idx = self._layer_idx, -1
        self._new = self._new_index = None
        layer = self._fresh(layer_idx)
        like = torch.empty(0, device=self._own.device)
        pretend(layer, self._start, len(self._sequences), like)

    def _fresh(self, layer_idx: int) -> Any:
        layer = self._own.new_layer(layer_idx)
        self.layers[layer_idx] = layer
        return layer

    def _past(self, layer_idx: int, kind: CacheKind, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values before the chunk that the layer still has, [R, G, S, D] each."""
        first = 0 if kind.window is None else max(self._start - kind.window + 1, 0)
        shape = len(self._sequences), kind.num_kv_heads, self._start - first
        with torch.inference_mode(mode=False):  # a store may keep what is made while it is read
            keys = like.new_empty(*shape, kind.head_dim, dtype=self._own.dtype)
            values = torch.empty_like(keys)
            for row, sequence in enumerate(self._sequences):
                place = 0
                blocks = self._store.blocks(layer_idx, sequence, self._start, first)
                for past_keys, past_values in blocks:
                    count = past_keys.shape[1]
                    for whole, part in ((keys, past_keys), (values, past_values)):
                        whole[row].narrow(1, place, count).copy_(part)
                    place += count
        return keys, values


class _LaidOut:
    """See `LaidOutCache.laid_out`."""

    def __init__(self, cache: LaidOutCache, layer_idx: int, like: Tensor, num_new: int) -> None:
        self._num_new = num_new
        self._cache = cache
        self._layer_idx = layer_idx
        self._like = like

    def __enter__(self) -> None:
        self._cache.begin(self._layer_idx, self._like)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._cache.end(self._num_new)
        else:
            self._cache.drop()
