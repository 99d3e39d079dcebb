"""One chunk's calls of the recurrent layers, and the states that these get there for a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from ollm_core.contracts.kv import KeepsStates, KVStore
from ollm_core.engine.batch import Chunk, NewTokens
from ollm_core.engine.layer_call import PositionEmbeddings, call_layer


class RecurrentCall:
    """One chunk's call of every recurrent layer. Drafted tokens go one by one, as when decoding,
    because the state before each is wanted.
    """

    def __init__(
        self, store: KVStore, work: Sequence[NewTokens], chunk: Chunk, positions: Tensor
    ) -> None:
        """`positions` [R, T] are those of the chunk."""
        assert isinstance(store, KeepsStates), "a model with recurrent layers has such a store"
        self._store: KeepsStates = store
        self._positions = positions
        self._sequences = tuple(work[row].sequence for row in chunk.rows)
        first = work[chunk.rows[0]]
        num_sure = min(len(first.token_ids) - first.num_drafted, chunk.end) - chunk.begin
        self._slices = [slice(i, i + 1) for i in range(max(num_sure, 0), chunk.num_tokens)]
        if num_sure > 0:
            self._slices.insert(0, slice(0, num_sure))

    def run(
        self,
        forward: Callable[..., Tensor],
        layer_idx: int,
        hidden: Tensor,
        embeddings: PositionEmbeddings,
    ) -> Tensor:
        """Run a recurrent layer, or its first half: [R, T, C] -> the same."""
        outputs = [
            self._run(forward, layer_idx, hidden, embeddings, tokens) for tokens in self._slices
        ]
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _run(
        self,
        forward: Callable[..., Tensor],
        layer_idx: int,
        hidden: Tensor,
        embeddings: PositionEmbeddings,
        tokens: slice,
    ) -> Tensor:
        cosines, sines = embeddings
        states = [self._store.state(layer_idx, sequence) for sequence in self._sequences]
        cache = StateCache(layer_idx, states, hidden.device)
        with torch.inference_mode():
            output = call_layer(
                forward,
                hidden[:, tokens],
                self._positions[:, tokens],
                (cosines[:, tokens], sines[:, tokens]),
                cache,
            )
        for sequence, state in zip(self._sequences, cache.states(), strict=True):
            self._store.put_state(layer_idx, sequence, output.shape[1], state)
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
