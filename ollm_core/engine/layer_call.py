"""One chunk's calls of every layer, and what a layer is given there for its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from ollm_core.attention.select import find_attention
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import KeepsStates, KVStore
from ollm_core.engine.batch import Chunk, NewTokens

Embeddings = tuple[Tensor, Tensor]
"""Cosines and sines, [R, T, D] each."""


class LayerCall:
    """One chunk's call of every layer; stands where a layer expects its cache."""

    def __init__(
        self,
        store: KVStore,
        work: Sequence[NewTokens],
        chunk: Chunk,
        attention: str,
        device: torch.device,
    ) -> None:
        self.embeddings: dict[str | None, Embeddings] = {}
        self._store = store
        # What a store keeps outlives the pass. One that is `in_place` sees to that itself.
        self._keeping = nullcontext() if store.in_place else torch.inference_mode(mode=False)
        self._attention = find_attention(attention, device)
        self._sequences = tuple(work[row].sequence for row in chunk.rows)
        self._starts = tuple(work[row].start + chunk.begin for row in chunk.rows)
        first = work[chunk.rows[0]]
        num_sure = min(len(first.token_ids) - first.num_drafted, chunk.end) - chunk.begin
        self._parts = [slice(i, i + 1) for i in range(max(num_sure, 0), chunk.num_tokens)]
        if num_sure > 0:
            self._parts.insert(0, slice(0, num_sure))
        steps = torch.arange(chunk.num_tokens, device=device)
        self.positions = torch.tensor(self._starts, device=device)[:, None] + steps  # [R, T]

    def attend(
        self, step: Callable[..., Tensor], layer_idx: int, hidden: Tensor, embeddings: Embeddings
    ) -> Tensor:
        """Run a layer with keys and values, or its first half: [R, T, C] -> the same."""
        with torch.inference_mode():  # its operations are cheaper by a tenth
            return run_layer(step, hidden, self.positions, embeddings, self)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[KVView, KVView]:
        """Store new keys and values [R, G, T, D]; what the attention function gets is a view of
        all.
        """
        with self._keeping:
            for row, sequence in enumerate(self._sequences):
                self._store.append(layer_idx, sequence, keys[row], values[row])
        view = KVView(
            keys, values, layer_idx, self._sequences, self._starts, self._store, self._attention
        )
        return view, view

    def step(
        self, step: Callable[..., Tensor], layer_idx: int, hidden: Tensor, embeddings: Embeddings
    ) -> Tensor:
        """Run a recurrent layer, or its first half: [R, T, C] -> the same. Drafted tokens go one by
        one, as when decoding, because the state before each is wanted.
        """
        store = self._store
        assert isinstance(store, KeepsStates), "a model with recurrent layers has such a store"
        parts = [
            self._part(step, layer_idx, hidden, embeddings, part, store) for part in self._parts
        ]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _part(
        self,
        step: Callable[..., Tensor],
        layer_idx: int,
        hidden: Tensor,
        embeddings: Embeddings,
        part: slice,
        store: KeepsStates,
    ) -> Tensor:
        cosines, sines = embeddings
        states = [store.state(layer_idx, sequence) for sequence in self._sequences]
        cache = StateCache(layer_idx, states, hidden.device)
        with torch.inference_mode():
            output = run_layer(
                step,
                hidden[:, part],
                self.positions[:, part],
                (cosines[:, part], sines[:, part]),
                cache,
            )
        for sequence, state in zip(self._sequences, cache.states(), strict=True):
            store.put_state(layer_idx, sequence, output.shape[1], state)
        return output


class StateCache(Cache):
    """The cache of one recurrent layer for one call: transformers' own layer inside."""

    def __init__(
        self,
        layer_idx: int,
        states: Sequence[Sequence[Tensor] | None],
        device: torch.device,
    ) -> None:
        """`states` of each row, which are copied; all of them are None before the first token."""
        super().__init__(layers=[])
        self._layer = LinearAttentionLayer()
        layers: list[Any] = [None] * layer_idx  # only this layer is asked for
        self.layers = [*layers, self._layer]
        rows = [state for state in states if state is not None]
        if rows:
            assert len(rows) == len(states), "rows of one call have all begun, or none has"
            convolution, recurrent = (
                torch.stack(tensors).to(device) for tensors in zip(*rows, strict=True)
            )
            self._layer.lazy_initialization(conv_states=convolution)
            self._layer.lazy_initialization(recurrent_states=recurrent)
            self._layer.conv_states[0] = convolution
            self._layer.recurrent_states[0] = recurrent
            self._layer.has_previous_state[0] = True

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Of each row, after the call."""
        convolution, recurrent = self._layer.conv_states[0], self._layer.recurrent_states[0]
        assert convolution is not None, "the layer was called"
        assert recurrent is not None, "the layer was called"
        return list(zip(convolution.unbind(), recurrent.unbind(), strict=True))


def run_layer(
    step: Callable[..., Tensor],
    hidden: Tensor,
    positions: Tensor,
    embeddings: Embeddings,
    cache: object,
) -> Tensor:
    """Call a layer, or its first half, as transformers does: [R, T, C] -> the same."""
    return step(
        hidden,
        attention_mask=None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        position_embeddings=embeddings,
    )
