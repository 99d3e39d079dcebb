"""Calls a model of transformers with what it remembers of a text, wherever the model keeps that:
in transformers' cache, in a cache that it makes itself, or in attributes of its modules.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

_TRIED = 4
"""Tokens of the runs by which a model shows what it does."""


class Past(DynamicCache):
    """What a model remembers of one text: transformers' cache, and what is kept elsewhere."""

    num_tokens = 0
    """Of the text."""
    dtype: torch.dtype | None = None
    """What the model computes in."""
    own: Any = None
    """The cache that the model has made itself, where it takes no other."""
    attributes: Mapping[tuple[str, str], Tensor | None] = {}
    """Values of attributes of modules, by the module's path and the attribute's name."""

    def states(self) -> Iterator[Tensor]:
        """Those of convolutions and recurrences, in every layer."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionLayer):
                held = *layer.conv_states.values(), *layer.recurrent_states.values()
                yield from (state for state in held if state is not None)

    def show_elsewhere(self) -> None:
        """Let layers of the cache have the states that are kept elsewhere, for who looks there."""
        states: dict[int, list[Tensor]] = {}
        for (path, _), state in self.attributes.items():
            if state is not None:
                layer_idx = next(int(part) for part in path.split(".") if part.isdecimal())
                states.setdefault(layer_idx, []).append(state)
        for value in vars(self.own).values() if self.own is not None else ():
            if isinstance(value, Mapping):
                states |= {layer_idx: list(of_one) for layer_idx, of_one in value.items()}
        for layer_idx, of_one in states.items():
            layer: Any = LinearAttentionLayer()
            layer.dtype = self.dtype
            layer.recurrent_states = dict(enumerate(of_one))
            self.layers[layer_idx] = layer


class PastCalls:
    """Calls one model of transformers. Between calls its modules are as before the first token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._parameters = inspect.signature(type(model).forward).parameters
        self._cache_name = (
            "cache_params" if "cache_params" in self._parameters else "past_key_values"
        )
        self._makes_cache, self._fresh = self._try()
        self._put(self._fresh)

    def new_past(self) -> Past:
        """Of a text that has no token yet, with the right kind of cache for each layer."""
        past = Past(config=self.model.config)
        past.dtype = self.model.dtype
        # Of the decoder of an encoder-decoder transformers makes one for each of the encoder's.
        del past.layers[getattr(self.model.config, "decoder_layers", len(past.layers)) :]
        return past

    @torch.no_grad()
    def call(self, ids: Tensor, past: Past, *, last_only: bool = False) -> Tensor:
        """Logits [B, T, V] of `ids` [B, T], after what is in `past`, in one call; of the last token
        alone with `last_only`, as `generate` asks for them.
        """
        options: dict[str, Any] = {
            self._cache_name: past.own if self._makes_cache else past,
            "use_cache": True,
        }
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = int(last_only)
        if "position_ids" in self._parameters:  # as `generate` does: some count from 0 without
            positions = torch.arange(past.num_tokens, past.num_tokens + ids.shape[1])
            options["position_ids"] = positions.to(ids.device).expand_as(ids)
        self._put(past.attributes or self._fresh)
        try:
            output = self.model(input_ids=ids, **options)
            held = dict(self._held()) if self._fresh else {}
            past.attributes = {key: held[key] for key in self._fresh}
        finally:
            self._put(self._fresh)
        if self._makes_cache:
            past.own = output[self._cache_name]
        past.show_elsewhere()
        past.num_tokens += ids.shape[1]
        logits: Tensor = output.logits
        return logits[:, -1:] if last_only else logits

    @functools.cached_property
    def begins_anew(self) -> bool:
        """Whether a call of several tokens does not go on from every state that the text before
        has left: some layers of transformers do so with one token alone.
        """
        past = self.new_past()
        ids = torch.zeros(1, _TRIED, dtype=torch.long, device=self.model.device)
        self.call(ids, past)
        for number, _ in enumerate(past.states()):
            changed = copy.deepcopy(past)
            list(changed.states())[number].fill_(torch.nan)
            if not self.call(ids, changed).isnan().any():
                return True
        return False

    def _try(self) -> tuple[bool, Mapping[tuple[str, str], Tensor | None]]:
        """Whether the model makes its cache itself; and of attributes of its modules that each call
        sets anew, by path and name, what they are before the first.
        """
        ids = torch.zeros(1, _TRIED, dtype=torch.long, device=self.model.device)
        fresh = dict(self._held())
        with torch.no_grad():
            self.model(input_ids=ids, use_cache=True)
            before = dict(self._held())  # some convert a constant in their first call
            output = self.model(input_ids=ids, use_cache=True)
        set_anew = {key for key, value in self._held() if value is not before[key]}
        made = output.get(self._cache_name)
        return made is not None and not isinstance(made, Cache), {
            key: value for key, value in fresh.items() if key in set_anew
        }

    def _held(self) -> Iterator[tuple[tuple[str, str], Tensor | None]]:
        for path, module in self.model.named_modules():
            for name, value in vars(module).items():
                if value is None or isinstance(value, Tensor):
                    yield (path, name), value

    def _put(self, values: Mapping[tuple[str, str], Tensor | None]) -> None:
        for (path, name), value in values.items():
            setattr(self.model.get_submodule(path), name, value)
