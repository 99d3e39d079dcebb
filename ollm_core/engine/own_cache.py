"""What layers get for a cache that are run by their model's own forward: transformers' own, with
their past laid out in it, or with handles that stand for the store's blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ollm_core.attention.own_layer import OwnLayerAttention
from ollm_core.contracts.attention import Attention, KVView
from ollm_core.contracts.kv import CacheKind, KeepsStates, KVStore
from ollm_core.errors import UnsupportedError
from ollm_core.model.layer_memory import LayerMemory, pretend, pretend_keys
from ollm_core.model.own_forward import OwnForward
from ollm_core.model.own_states import Apart


class OwnCache(Cache, ABC):
    """The cache that transformers makes for a model. Of its layers it holds one at a time: for the
    others it only says how long their past is.
    """

    def __init__(
        self, own: OwnForward, store: KVStore, sequences: Sequence[int], start: int
    ) -> None:
        """Of `sequences`, after `start` tokens of each."""
        super().__init__(layers=[own.new_layer(i) for i in range(own.num_layers)])
        self._own = own
        self._store = store
        self._sequences = tuple(sequences)
        self._start = start
        self._layer_idx = -1
        self.answer: tuple[Tensor, Tensor] | None = None
        """What the layer that is called was given for its keys and values, in whole."""
        self._keeping = nullcontext() if store.in_place else torch.inference_mode(mode=False)
        self._like = torch.empty(0, device=own.device)
        for layer_idx in own.facts.called:
            pretend(self.layers[layer_idx], start, len(sequences), self._like)

    def rewind(self) -> None:
        """Before each run of the model's forward: positions are those before the chunk again."""
        for memory, layer in zip(self._own.facts.memories, self.layers, strict=True):
            memory.fill_positions(layer, self._start, len(self._sequences), self._like)

    @contextmanager
    def around(self, layer_idx: int, like: Tensor, num_new: int) -> Iterator[Apart]:
        """In the `with` a layer may be called, its past being here, as tensors `like` hidden
        states, but for its states that are kept apart from a cache; after it, what the layer has
        added for `num_new` tokens is in the store, those states too.
        """
        self._layer_idx = layer_idx
        apart = Apart()
        try:
            self._begin(layer_idx, like, apart)
            yield apart
            self._end(layer_idx, num_new, apart)
        finally:
            self._layer_idx, self.answer = -1, None
            self._drop()
            pretend(self._fresh(layer_idx), self._start, len(self._sequences), self._like)

    def _begin(self, layer_idx: int, like: Tensor, apart: Apart) -> None:
        memory = self._own.facts.memories[layer_idx]
        layer = self._fresh(layer_idx)
        if not self._start:
            return
        if memory.kind.has_keys:
            pretend(layer, self._start, len(self._sequences), like)
            self._lay_out(layer_idx, memory, like)
        if memory.kind.states:
            assert isinstance(self._store, KeepsStates), "such a model has such a store"
            rows = [self._store.state(layer_idx, one) for one in self._sequences]
            states = [torch.stack(same).to(like.device) for same in zip(*rows, strict=True)]
            apart.states = memory.fill_states(layer, states)

    def _end(self, layer_idx: int, num_new: int, apart: Apart) -> None:
        memory = self._own.facts.memories[layer_idx]
        if memory.kind.has_keys:
            self._keep(layer_idx, memory)
        if memory.kind.states:
            assert isinstance(self._store, KeepsStates), "such a model has such a store"
            states = [*memory.states(self.layers[layer_idx]), *apart.states]
            for row, sequence in enumerate(self._sequences):
                state = [one[row] for one in states]
                self._store.put_state(layer_idx, sequence, num_new, state)

    @abstractmethod
    def _lay_out(self, layer_idx: int, memory: LayerMemory, like: Tensor) -> None:
        """Before a layer is called that has keys and values: what it finds of those before."""

    @abstractmethod
    def _keep(self, layer_idx: int, memory: LayerMemory) -> None:
        """After it: its keys and values are in the store. Raises UnsupportedError if it had none
        kept.
        """

    @abstractmethod
    def _drop(self) -> None:
        """Hold nothing of the layer that was called."""

    def _append(self, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Store new keys and values [R, G, T, D]."""
        with self._keeping:
            for row, sequence in enumerate(self._sequences):
                self._store.append(layer_idx, sequence, keys[row], values[row])

    def _check(self, layer_idx: int) -> None:
        """Raises UnsupportedError for a layer that writes into the cache of another one."""
        if layer_idx != self._layer_idx:
            raise UnsupportedError(
                f"layer {self._layer_idx} writes into the cache of layer {layer_idx}",
                hint="core keeps the past of each layer by itself",
            )

    def _fresh(self, layer_idx: int) -> Any:
        layer = self._own.new_layer(layer_idx)
        self.layers[layer_idx] = layer
        return layer


class LaidOutCache(OwnCache):
    """Gives a layer its past in whole, as transformers' own cache does."""

    def __init__(
        self, own: OwnForward, store: KVStore, sequences: Sequence[int], start: int
    ) -> None:
        super().__init__(own, store, sequences, start)
        self._new: tuple[Tensor, Tensor] | None = None
        self._new_index: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See Cache. What is new, [R, G, T, D], is stored."""
        self._check(layer_idx)
        self._new = key_states, value_states
        found: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        self.answer = found
        return found

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """See Cache. What is new, [R, T, I], is stored."""
        self._check(layer_idx)
        self._new_index = indexer_key_states
        found: Tensor = super().update_indexer(indexer_key_states, layer_idx)
        return found

    def _lay_out(self, layer_idx: int, memory: LayerMemory, like: Tensor) -> None:
        memory.fill(self.layers[layer_idx], *self._past(layer_idx, memory.kind, like))

    def _keep(self, layer_idx: int, memory: LayerMemory) -> None:
        if self._new is None:
            raise _not_kept(layer_idx)
        self._append(layer_idx, *memory.pack(*self._new, self._new_index))

    def _drop(self) -> None:
        self._new = self._new_index = None

    def _past(self, layer_idx: int, kind: CacheKind, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values before the chunk that the layer still has, [R, G, S, D] each."""
        first = 0 if kind.window is None else max(self._start - kind.window + 1, 0)
        shape = len(self._sequences), kind.num_kv_heads, self._start - first
        with self._keeping:  # a store may keep what is made while it is read
            keys = like.new_empty(*shape, kind.head_dim, dtype=self._own.facts.dtype)
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


class HandleCache(OwnCache):
    """Stores what is new at once, and answers with a handle, which the layer hands to `attention`:
    that it does so was seen when the model was opened.
    """

    def __init__(
        self,
        own: OwnForward,
        store: KVStore,
        sequences: Sequence[int],
        start: int,
        attention: Attention,
    ) -> None:
        super().__init__(own, store, sequences, start)
        self._attention = attention
        self._kept = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> Any:
        """See Cache. What is new, [R, G, T, D], is stored; a view of all stands for both."""
        self._check(layer_idx)
        if self._kept:
            raise UnsupportedError(
                f"layer {layer_idx} keeps keys and values twice",
                hint="use precision='exact'",
            )
        self._kept = True
        memory = self._own.facts.memories[layer_idx]
        value_dim, num_rows = value_states.shape[-1], len(self._sequences)
        keys, values = memory.pack(key_states, value_states, None)
        self._append(layer_idx, keys, values)
        pretend_keys(self.layers[layer_idx], self._start + keys.shape[2], num_rows, self._like)
        attention = OwnLayerAttention(self._attention, memory.kind.window, value_dim)
        starts = (self._start,) * num_rows
        view = KVView(
            keys,
            values,
            layer_idx,
            self._sequences,
            starts,
            self._store,
            attention,
            shares=False,  # which no plan of such a model counts
        )
        return view, view

    def _lay_out(self, layer_idx: int, memory: LayerMemory, like: Tensor) -> None:
        """It finds how long its past is, as for other layers."""

    def _keep(self, layer_idx: int, memory: LayerMemory) -> None:
        if not self._kept:
            raise _not_kept(layer_idx)

    def _drop(self) -> None:
        self._kept = False


def _not_kept(layer_idx: int) -> UnsupportedError:
    return UnsupportedError(f"layer {layer_idx} does not keep its keys and values")
