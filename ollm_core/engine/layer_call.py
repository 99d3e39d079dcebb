"""One chunk's calls of the layers with keys and values, and what these get there for a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ollm_core.attention.select import find_attention
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import KVStore
from ollm_core.engine.batch import Chunk, NewTokens

PositionEmbeddings = tuple[Tensor, Tensor]
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
        *,
        shares: bool,
    ) -> None:
        """`shares` says whether attention may read once what several rows share."""
        self.embeddings: dict[str | None, PositionEmbeddings] = {}
        """Those that further layers of a type take, too."""
        self._store = store
        # What a store keeps outlives the pass. One that is `in_place` sees to that itself.
        self._keeping = nullcontext() if store.in_place else torch.inference_mode(mode=False)
        self._attention = find_attention(attention, device)
        self._shares = shares
        self._sequences = tuple(work[row].sequence for row in chunk.rows)
        self._starts = tuple(work[row].start + begin for row, begin, _ in chunk.spans)
        self._lengths = chunk.lengths
        self.positions = chunk.positions(work).to(device)  # [R, T]

    def run(
        self,
        forward: Callable[..., Tensor],
        layer_idx: int,
        hidden: Tensor,
        embeddings: PositionEmbeddings,
    ) -> Tensor:
        """Run a layer with keys and values, or its first half: [R, T, C] -> the same."""
        with torch.inference_mode():  # its operations are cheaper by a tenth
            return call_layer(forward, hidden, self.positions, embeddings, self)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[KVView, KVView]:
        """Store new keys and values [R, G, T, D]; what the attention function gets is a view of
        all.
        """
        view = KVView(
            keys,
            values,
            layer_idx,
            self._sequences,
            self._starts,
            self._store,
            self._attention,
            self._shares,
            self._lengths,
        )
        rows = zip(self._sequences, view.split(keys), view.split(values), strict=True)
        with self._keeping:
            for sequence, new_keys, new_values in rows:
                self._store.append(layer_idx, sequence, new_keys, new_values)
        return view, view


def call_layer(
    forward: Callable[..., Tensor],
    hidden: Tensor,
    positions: Tensor,
    embeddings: PositionEmbeddings,
    cache: object,
) -> Tensor:
    """Call a layer, or its first half, as transformers does: [R, T, C] -> the same."""
    return forward(
        hidden,
        attention_mask=None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        position_embeddings=embeddings,
    )
