"""One chunk's calls of layers that get what the model's own forward gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ollm_core.attention.select import ATTENTION_NAME, EAGER_NAME, find_attention
from ollm_core.contracts.attention import Attention
from ollm_core.contracts.kv import KVStore
from ollm_core.device.offload import ActivationOffload
from ollm_core.engine.own_cache import HandleCache, LaidOutCache, OwnCache
from ollm_core.engine.shared_keys import SharedKeys, check_shared, pretend_shared
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
        attention: Attention | None,
        *,
        alone: bool,
        offload: ActivationOffload | None = None,
        before: OwnCall | None = None,
    ) -> None:
        """`ids` [R, T] come after `start` tokens of each of `sequences`. `attention` None: the
        model's own, eager one, over a past laid out. `alone`: there is no other chunk, so what
        layers are called with may be kept from one to the next. What layers hand on beside hidden
        states waits where `offload` has it; None: on the device. `before` is the call of the chunk
        before, of the same sequences; None: there is none in this pass.
        """
        self._offload = offload or ActivationOffload(ids.device, on_host=False)
        self.handed: list[Tensor] = []
        """What the last layer that was run hands to the next one, in the order of `Facts.handed`,
        where it is offloaded.
        """
        self._own = own
        self._attention = EAGER_NAME if attention is None else ATTENTION_NAME
        self._store = store
        self._sequences = tuple(sequences)
        self._ids = ids
        self._start = start
        self._embed = embed
        self._alone = alone
        self._arguments: Mapping[int, LayerArguments] = {}
        self._shared: SharedKeys | None = None
        if own.facts.shared and not alone:
            self._shared = SharedKeys(self._offload, None if before is None else before._shared)
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        self._positions = positions.expand(ids.shape[0], -1)
        self._cache: OwnCache = (
            LaidOutCache(own, store, self._sequences, start)
            if attention is None
            else HandleCache(own, store, self._sequences, start, attention)
        )

    def enter(self) -> Tensor:
        """Hidden states before the first layer, [R, T, C]."""
        with self._computing():
            rows = self._embed(self._ids.flatten())
            self._cache.rewind()
            hidden, found = self._own.enter(
                self._ids,
                self._positions,
                rows,
                self._cache,
                -1 if self._alone else self._own.facts.called[0],
            )
            if self._alone:
                self._arguments = found
            return hidden

    def pretend_shared(self, layer_idx: int, dtype: torch.dtype) -> None:
        """Let a layer find what those before it would have handed on in a mapping."""
        facts, num_new = self._own.facts, self._ids.shape[1]
        pairs = [one for one in facts.shared if one.layer_idx < layer_idx]
        windows = [facts.memories[one.layer_idx].kind.window for one in pairs]
        pasts = [self._start if one is None else min(self._start, one - 1) for one in windows]
        like = torch.empty(len(self._sequences), 0, dtype=dtype, device=self._ids.device)
        lengths = [past + num_new for past in pasts]
        if pairs:
            pretend_shared(pairs, self._arguments[layer_idx], lengths, like)

    def run(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Run a layer: [R, T, C] -> the same."""
        if layer_idx not in self._own.facts.called:
            return hidden
        with self._computing():
            if self._alone:
                arguments = self._arguments[layer_idx]
            else:
                self._cache.rewind()
                rows = self._rows(hidden)
                arguments = self._own.enter(
                    self._ids, self._positions, rows, self._cache, layer_idx
                )[1][layer_idx]  # what others are called with is not kept
                del rows
            if layer_idx and self._own.facts.handed:
                fetched = map(self._offload.fetch, self.handed)
                places = self._own.facts.handed.values()
                arguments = arguments.replaced(dict(zip(places, fetched, strict=True)))
            if self._shared:
                self._shared.fill(arguments)
            given = [pair for one in arguments.mappings.values() for pair in one.values()]
            with self._cache.around(layer_idx, hidden, self._ids.shape[1]) as apart:
                output, handed = self._own.call(layer_idx, hidden, arguments, apart)
                if self._own.facts.shared:
                    check_shared(arguments, given, self._cache.answer)
            if self._shared:
                self._shared.keep(arguments, self._ids.shape[1])
            if layer_idx < self._own.num_layers - 1:
                if self._offload.on_host and self.handed:
                    pairs = zip(self.handed, handed, strict=True)
                    handed = [self._offload.put(place, value) for place, value in pairs]
                else:
                    handed = [self._offload.store(value) for value in handed]
                self.handed = handed
            return output

    def leave(self, hidden: Tensor, num_logits: int) -> Tensor:
        """Logits [R, n, V] at the last positions."""
        self._arguments, self.handed, self._shared = {}, [], None
        with self._computing():
            self._cache.rewind()
            return self._own.leave(
                self._ids, self._positions, self._rows(hidden), self._cache, hidden, num_logits
            )

    def _computing(self) -> torch.inference_mode:
        """Each model is told again by what it attends: another call may have told it otherwise."""
        self._own.attend_by(self._attention)
        return torch.inference_mode()

    def _rows(self, hidden: Tensor) -> Tensor:
        """Rows of the embedding; where nothing depends on them, some of the right shape."""
        if self._own.facts.uses_embedding:
            return self._embed(self._ids.flatten())
        nothing = hidden.new_zeros(1, self._own.embedding_size, dtype=self._own.facts.dtype)
        return nothing.expand(self._ids.numel(), -1)


def own_attention(name: str, device: torch.device) -> Attention | None:
    """The attention that a pass was planned with, one of ATTENTIONS, as an OwnCall takes it."""
    return None if name == "exact" else find_attention(name, device, caps=True)
