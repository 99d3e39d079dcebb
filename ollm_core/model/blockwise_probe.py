"""Looks, when a model is opened that is run by its own forward, whether the attention of its layers
can be computed block by block.

A layer's cache then answers with a handle in place of keys and values, which must reach the
attention function as it is. What is looked at, without names of models:

- what the layer's mask shows is what core's attention sees, all earlier tokens or a window of them;
- a layer that is called with handles runs, around its attention function, just the operations that
  it runs with eager attention;
- the family's eager function and core's give the same numbers, with all that the layer hands on.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from ollm_core.attention.exact import family_eager
from ollm_core.attention.select import ATTENTION_NAME, EAGER_NAME
from ollm_core.contracts.attention import KVView
from ollm_core.contracts.kv import KVStore
from ollm_core.errors import one_line
from ollm_core.memory.tracker import OperationMode, called_operations, tensors_in
from ollm_core.model.attention_probe import AttentionCall, OneBlock
from ollm_core.model.layer_memory import LayerMemory, pretend
from ollm_core.model.mask_probe import MADE_UP, MadeUp, NotSeen, mask_of, shows
from ollm_core.model.own_forward import LayerArguments, OwnForward

_TRIED = 5
"""New tokens of a call that is looked at."""
_PASTS = 40, 90
"""Tokens before them."""
_FARTHEST = 1 << 17
"""Tokens after which a mask is looked at, at most: one that hides those far away shows there."""
_CPU, _META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True, slots=True)
class Blockwise:
    """What was seen."""

    refusal: str
    """Why the layers cannot attend block by block, in a few words; empty: they can."""
    grows: bool = False
    """Whether something beside attention is as long as the past."""


def probe_blockwise(
    own: OwnForward, layers: Sequence[nn.Module], mixtures: Sequence[Any], max_positions: int
) -> Blockwise:
    """Look at a followed model without data. `max_positions`: the most tokens of a sequence."""
    try:
        with ExitStack() as stack:
            stack.callback(own.attend_by, EAGER_NAME)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for mixture in mixtures:
                stack.enter_context(mixture.idle())
            grows = _Probe(own, layers).look(min(max_positions, _FARTHEST))
    except NotSeen as refused:
        return Blockwise(str(refused))
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything
        return Blockwise(f"its layers do not hand on what a cache gives them: {one_line(error)}")
    return Blockwise("", grows)


class _Probe:
    """One model, looked at."""

    def __init__(self, own: OwnForward, layers: Sequence[nn.Module]) -> None:
        self._own = own
        self._layers = layers
        self._memories = own.facts.memories

    def look(self, max_positions: int) -> bool:
        """Whether something beside attention grows. Raises NotSeen."""
        if self._own.facts.shared:
            raise NotSeen("its layers share keys and values")
        if any(self._own.facts.places):
            raise NotSeen("its layers keep states beside the cache")
        if self._own.facts.handed:
            raise NotSeen("its layers hand values to each other")
        if any(memory.index_dim for memory in self._memories):
            raise NotSeen("an index chooses the keys that its layers attend to")
        self._look_at_masks(max_positions)
        kinds: dict[Hashable, int] = {}
        for layer_idx in self._own.facts.called:
            kind = _kind(self._layers[layer_idx], self._memories[layer_idx])
            kinds.setdefault(kind, layer_idx)
        with self._own.facts.answers():
            calls = {layer_idx: self._look_at_layer(layer_idx) for layer_idx in kinds.values()}
            grows = self._grows(tuple(kinds.values()))
        for layer_idx, of_layer in calls.items():
            for call in of_layer:
                call.compare(self._memories[layer_idx])
        return grows

    def _look_at_masks(self, max_positions: int) -> None:
        """Each mask shows what core's attention sees."""
        windows = {one.kind.window for one in self._memories if one.kind.window is not None}
        starts = {0, max(max_positions - 4 * _TRIED, 0)}
        starts |= {start for window in windows for start in (max(window - 3, 0), 2 * window)}
        for start in sorted(start for start in starts if start < _FARTHEST):
            with MadeUp():
                _, eager = self._given(EAGER_NAME, start, _CPU)
                _, plain = self._given(ATTENTION_NAME, start, _CPU)
            seen: set[tuple[int, int | None]] = set()
            for layer_idx, memory in enumerate(self._memories):
                if not memory.kind.has_keys:
                    continue
                mask, window = mask_of(eager[layer_idx], plain[layer_idx]), memory.kind.window
                if mask is None:
                    raise NotSeen("its layers are given no mask")
                if (id(mask), window) in seen:
                    continue
                seen.add((id(mask), window))
                if not shows(mask, start, window):
                    what = "all earlier tokens" if window is None else f"a window of {window}"
                    raise NotSeen(f"the mask of layer {layer_idx} shows something else than {what}")

    def _look_at_layer(self, layer_idx: int) -> list[AttentionCall]:
        """It does with handles what it does without. The calls of its attention."""
        own, memory, start = self._own, self._memories[layer_idx], _PASTS[0]
        parameters = dict(self._layers[layer_idx].named_parameters())
        hidden = torch.empty(own.facts.hidden_shape(1, _TRIED), dtype=own.facts.dtype, device=_META)
        cache, usual = self._given(EAGER_NAME, start, _META)
        cache.fill(layer_idx, memory)
        expected = called_operations(
            lambda: own.call_layer(layer_idx, hidden, usual[layer_idx]), parameters
        )
        cache, plain = self._given(ATTENTION_NAME, start, _META)
        cache.fill(layer_idx, memory)
        mask = mask_of(usual[layer_idx], plain[layer_idx])
        calls: list[AttentionCall] = []

        def attend(
            module: nn.Module, query: Tensor, view: KVView, *, scaling: float, **options: Any
        ) -> Tensor:
            calls.append(AttentionCall(module, query.shape, scaling, options))
            eager = family_eager(module)
            output: Tensor = eager(
                module, query, view.keys, view.values, mask, scaling=scaling, **options
            )[0]
            return output

        cache.answer_by = attend
        found = called_operations(
            lambda: own.call_layer(layer_idx, hidden, plain[layer_idx]), parameters
        )
        if len(calls) != int(memory.kind.has_keys):
            raise NotSeen("its attention does not go through transformers' AttentionInterface")
        if found != expected:
            pairs = itertools.zip_longest(expected, found, fillvalue="nothing")
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            raise NotSeen(
                f"layer {layer_idx} computes {one} by eager attention and {other} by another"
            )
        return calls

    def _grows(self, layer_indices: Sequence[int]) -> bool:
        """Whether what layers do beside attention, and what they are given, takes more memory after
        more tokens.
        """
        own = self._own
        hidden = torch.empty(own.facts.hidden_shape(1, _TRIED), dtype=own.facts.dtype, device=_META)
        totals: list[int] = []
        for start in _PASTS:
            with _Sizes() as sizes:
                cache, given = self._given(ATTENTION_NAME, start, _META)
                cache.fill_states(self._memories)
                cache.answer_by = _nothing
                for layer_idx in layer_indices:
                    own.call_layer(layer_idx, hidden, given[layer_idx])
            totals.append(sizes.total)
        return len(set(totals)) > 1

    def _given(
        self, attention: str, start: int, device: torch.device
    ) -> tuple[_ProbeCache, Mapping[int, LayerArguments]]:
        """What the layers are called with after `start` tokens, and the cache that they find."""
        own = self._own
        own.attend_by(attention)
        cache = _ProbeCache(own, start, device)
        ids = torch.zeros(1, _TRIED, dtype=torch.long, device=device)
        positions = torch.arange(start, start + _TRIED, device=device)[None]
        rows = torch.empty(_TRIED, own.embedding_size, dtype=own.facts.dtype, device=device)
        rows.fill_(MADE_UP)
        return cache, own.enter(ids, positions, rows, cache)[1]


class _ProbeCache(Cache):
    """transformers' cache of a model after some tokens, of which it holds none but those of a layer
    that is filled; answers with handles if it is told by what.
    """

    def __init__(self, own: OwnForward, start: int, device: torch.device) -> None:
        super().__init__(layers=[own.new_layer(i) for i in range(own.num_layers)])
        self.answer_by: Any = None
        """An attention function, of which handles tell."""
        self._own = own
        self._start = start
        self._like = torch.empty(0, dtype=own.facts.dtype, device=device)
        for layer_idx in own.facts.called:
            pretend(self.layers[layer_idx], start, 1, self._like)

    def fill(self, layer_idx: int, memory: LayerMemory) -> None:
        """Give a layer a past without data."""
        layer, kind = self.layers[layer_idx], memory.kind
        if kind.has_keys:
            length = self._start if kind.window is None else min(self._start, kind.window - 1)
            keys = self._like.new_empty(1, kind.num_kv_heads, length, kind.head_dim)
            memory.fill(layer, keys, torch.empty_like(keys))
        self._fill_states(layer, memory)

    def fill_states(self, memories: Sequence[LayerMemory]) -> None:
        """Give all layers states without data."""
        for layer, memory in zip(self.layers, memories, strict=True):
            self._fill_states(layer, memory)

    def _fill_states(self, layer: Any, memory: LayerMemory) -> None:
        states = [
            self._like.new_empty(1, *one.shape, dtype=torch.float32 if one.float32 else None)
            for one in memory.kind.states
        ]
        memory.fill_states(layer, states)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """See Cache."""
        if self.answer_by is not _nothing:
            key_states, value_states = super().update(
                key_states, value_states, layer_idx, *args, **kwargs
            )
        if self.answer_by is None:
            return key_states, value_states
        store = cast("KVStore", OneBlock(key_states, value_states))
        starts = (self._start,)
        view = KVView(key_states, value_states, layer_idx, (0,), starts, store, self.answer_by)
        return view, view


class _Sizes(OperationMode):
    """Adds up the bytes that are behind what operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self.total += sum(one.untyped_storage().nbytes() for one in tensors_in(result))
        return result


def _nothing(module: nn.Module, query: Tensor, view: KVView, **options: Any) -> Tensor:
    """Stands for attention: an output of its shape."""
    num_rows, num_heads, num_new = query.shape[:3]
    return query.new_empty(num_rows, num_new, num_heads, view.values.shape[-1])


def _kind(layer: nn.Module, memory: LayerMemory) -> Hashable:
    """What tells layers apart: what they remember, their parameters, and their constants."""
    parameters = tuple((name, value.shape) for name, value in layer.named_parameters())
    constants = tuple(
        (path, type(module).__name__, name, value)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (int, float, str, bool, type(None))) and name != "layer_idx"
    )
    return memory, parameters, constants
