"""Runs a model's own forward, for models of which core does not know what they do around their
layers: embeddings with positions or norms, masks, biases of attention, heads of several parts.

The forward is transformers' own, run with stand-ins for its layers. Up to a layer it tells what
that layer is called with; from the last layer on it makes logits. Nothing is declared, and whatever
the model computes there is computed. What this takes for granted is looked at when a model is
opened, by `follow_forward`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ollm_core.contracts.model import Layout
from ollm_core.errors import UnsupportedError
from ollm_core.memory.tracker import OperationMode, tensors_in
from ollm_core.model.layer_memory import LayerMemory, layer_maker, new_cache
from ollm_core.model.own_states import Apart, StatePlaces

_CACHES = ("past_key_values", "cache_params")
"""What models call the cache that they are given."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerArguments:
    """What a layer is called with, without its hidden states."""

    args: tuple[Any, ...]
    options: Mapping[str, Any]
    name: str
    """Of the option that takes hidden states; empty where they are the first argument."""

    @property
    def present(self) -> tuple[object, ...]:
        """Which arguments are there at all."""
        options = sorted((name, value is not None) for name, value in self.options.items())
        return *(one is not None for one in self.args), *options

    @property
    def mappings(self) -> Mapping[str, MutableMapping[Any, Any]]:
        """Those of `options` in which layers may hand something to later ones."""
        options = self.options.items()
        return {name: value for name, value in options if isinstance(value, MutableMapping)}

    def at(self, place: int | str) -> Any:
        """One of `args` by its number, or of `options` by its name; None if it is not there."""
        if isinstance(place, str):
            return self.options.get(place)
        return self.args[place] if place < len(self.args) else None

    def replaced(self, values: Mapping[int | str, Any]) -> LayerArguments:
        """The same with other `values` at some places."""
        args = tuple(values.get(number, one) for number, one in enumerate(self.args))
        options = {name: values.get(name, one) for name, one in self.options.items()}
        return LayerArguments(args, options, self.name)

    def call(self, forward: Callable[..., Any], hidden: Tensor) -> Any:
        """What `forward` gives for `hidden`."""
        if self.name:
            return forward(*self.args, **{**self.options, self.name: hidden})
        return forward(hidden, *self.args, **self.options)


Answer = Callable[[int, Tensor, LayerArguments], Any]
"""Stands for a layer, given its number, hidden states and what else it is called with."""


@dataclass(frozen=True, slots=True)
class SharedPair:
    """Keys and values that a layer hands to later ones, which have none of their own."""

    layer_idx: int
    """Of the layer that hands them on."""
    place: str
    """Which option of the layers is the mapping that they find them in."""
    key: Hashable
    """And where in it."""
    sizes: tuple[tuple[int, int], ...]
    """Heads, and numbers in each head of one token: of keys, then of values."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a forward that was followed."""

    memories: tuple[LayerMemory, ...]
    """What each layer remembers."""
    answers: Callable[[], OperationMode]
    """What answers questions about data while the model is traced without."""
    called: tuple[int, ...]
    """Layers that are called, in order; others are for images, and what is before them goes on."""
    returned: tuple[int, ...]
    """How many values each layer returns; -1: hidden states as they are."""
    handed: Mapping[int, int | str]
    """Which values that a layer returns beside hidden states the next one is called with, by their
    number, and at which place of its arguments.
    """
    places: tuple[StatePlaces, ...]
    """Where each layer keeps states beside the cache."""
    shared: tuple[SharedPair, ...]
    """What layers hand to later ones in a mapping, in their order."""
    continues: bool
    """Whether layers go on from their states with several tokens in one call. Some of transformers'
    do so with one token alone, and with more begin anew.
    """
    uses_embedding: bool
    """Whether layers or the head are given what depends on the embedding, beside hidden states."""
    dtype: torch.dtype
    """What the model computes in, keys and values too."""
    hidden_dtypes: frozenset[torch.dtype]
    """Those of hidden states between layers: some models add up in float32."""
    shape: tuple[tuple[int, ...], tuple[int, ...]]
    """That of hidden states, before and after rows and tokens."""
    width: int
    """Numbers in the hidden states of one token between layers."""
    converted: Mapping[str, torch.dtype]
    """Constants that the model converts when it is first run, and keeps so, by name."""

    @property
    def shared_numbers(self) -> int:
        """Numbers for each token in what layers hand on so."""
        return sum(heads * size for one in self.shared for heads, size in one.sizes)

    def hidden_shape(self, num_rows: int, num_tokens: int) -> tuple[int, ...]:
        """That of hidden states between layers, mostly [R, T, C]."""
        before, after = self.shape
        return *before, num_rows, num_tokens, *after


class _Reached(Exception):
    """Leaves the forward at the layer that was asked for."""


@dataclass(slots=True)
class Run:
    """One run of the forward: what its parts answer, and what was seen of it."""

    rows: Tensor
    """[R * T, C], of the embedding."""
    answer: Answer
    num_logits: int = 0
    """Rows of the head's input that count, from the end; 0: all."""
    hidden: Tensor | None = None
    """What the first layer is given."""
    found: dict[int, LayerArguments] = field(default_factory=dict)
    """What each layer is called with that is called."""
    num_calls: int = 0


class OwnForward:
    """The forward of one model whose layers are called by somebody else."""

    facts: Facts
    """What following it has found."""

    def __init__(self, model: Any, layout: Layout, layers: Sequence[nn.Module]) -> None:
        """Puts stand-ins for `layers` and the embedding into `model`."""
        self.model = model
        self.device = torch.device("meta")
        """Where the model is run."""
        self.makes_cache = False
        """Whether the model makes its cache itself, in each run, and gives layers their states in
        it as an argument.
        """
        self.num_caches = 0
        """Layers of the cache that transformers makes for the model."""
        self.made_cache: type | None = None
        """The kind that the last run has made so. The cache itself is not kept."""
        self.layers = layers
        self._run: Run | None = None
        self._forwards: list[Callable[..., Any]] = [layer.forward for layer in layers]
        self._embedding = model.get_submodule(layout.embedding)
        self._embed_forward = self._embedding.forward
        self._embedding.padding_idx = None  # for training; rows are numbered anew
        self._embedding.forward = self._embed
        for i, layer in enumerate(layers):
            layer.forward = self._stand_in(i)
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in _CACHES if name in parameters), "")
        self._takes_positions = "position_ids" in parameters
        self._cuts_logits = "logits_to_keep" in parameters
        self._new_layers = [layer_maker(one) for one in self.new_cache().layers]
        configs = (getattr(module, "config", None) for module in model.modules())
        self._configs = {id(one): one for one in configs if isinstance(one, PreTrainedConfig)}

    @property
    def embedding_size(self) -> int:
        """Numbers in a row of the embedding."""
        return int(self._embedding.weight.shape[-1])

    @property
    def takes_cache(self) -> bool:
        """Whether the model takes a cache of transformers."""
        return bool(self._cache_name)

    def head_rows(self, num_logits: int, num_tokens: int) -> int:
        """How many states the head multiplies where so many logits of so many tokens are wanted:
        some models always make all.
        """
        return num_logits if self._cuts_logits else num_tokens

    @property
    def num_layers(self) -> int:
        """How many there are."""
        return len(self._forwards)

    def new_cache(self) -> DynamicCache:
        """An empty cache as transformers makes it for the model. Of some decoders it has as many
        layers as the encoder that they were taken from: those that are too many are left out, and
        whoever asked for one would not find it. In transformers 5.17 the last layers of some have
        none, as they take the keys of others.
        """
        cache = new_cache(self.model.config)
        self.num_caches = len(cache.layers)
        del cache.layers[self.num_layers :]
        cache.layers += [DynamicLayer() for _ in range(self.num_layers - self.num_caches)]
        return cache

    def new_layer(self, layer_idx: int) -> Any:
        """An empty layer of transformers' cache of the model."""
        return self._new_layers[layer_idx]()

    def attend_by(self, attention: str) -> None:
        """Let layers call the function of that name in transformers' AttentionInterface, and the
        forward make masks for it.
        """
        for config in self._configs.values():
            if config._attn_implementation != attention:
                config._attn_implementation = attention

    def enter(
        self, ids: Tensor, positions: Tensor, rows: Tensor, cache: object, last: int = -1
    ) -> tuple[Tensor, Mapping[int, LayerArguments]]:
        """What the first layer is given, and what all layers up to `last` are called with that are
        called; -1: all.

        `ids` and `positions` [R, T], `rows` [R * T, C] of the embedding table, `cache` of the past.
        """
        last = last if last >= 0 else self.facts.called[-1]

        def answer(layer_idx: int, hidden: Tensor, given: LayerArguments) -> Any:
            if hidden.numel() != ids.numel() * self.facts.width:
                raise self.error(f"takes {ids.shape[1]} tokens in several parts")
            self._check_called(layer_idx)
            if layer_idx == last:
                raise _Reached
            return self._as_returned(layer_idx, hidden, given)

        run = Run(rows, answer)
        with suppress(_Reached):
            self.run(run, ids, positions, cache)
        assert run.hidden is not None, "the forward was followed when the model was opened"
        for one in run.found.values():
            self._check_here(run.hidden, *tensors_in(one.args, one.options))
        return run.hidden, run.found

    def leave(
        self,
        ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        cache: object,
        hidden: Tensor,
        num_logits: int,
    ) -> Tensor:
        """Logits [R, n, V] at the last positions, where `hidden` is what the last layer gives."""

        def answer(layer_idx: int, states: Tensor, given: LayerArguments) -> Any:
            self._check_called(layer_idx)
            at_last = layer_idx == self.facts.called[-1]
            return self._as_returned(layer_idx, hidden if at_last else states, given)

        logits = self.run(Run(rows, answer, num_logits), ids, positions, cache)
        self._check_here(logits)
        if not self._cuts_logits:  # all are made, as products of other shapes have other last bits
            logits = logits[:, -num_logits:].clone()
        return logits

    def call(
        self, layer_idx: int, hidden: Tensor, arguments: LayerArguments, apart: Apart
    ) -> tuple[Tensor, list[Tensor]]:
        """The hidden states that the layer itself gives, and what it hands to the next one. `apart`
        has its states beside the cache, and gets those after the call.
        """
        layer, places = self.layers[layer_idx], self.facts.places[layer_idx]
        if places.argument is not None and apart.states:
            arguments = arguments.replaced({places.argument: tuple(apart.states)})
        places.put(layer, apart.states)
        try:
            output = self.call_layer(layer_idx, hidden, arguments)
            given = None if places.argument is None else arguments.at(places.argument)
            apart.states = places.taken(layer, given, output)
        finally:
            places.put(layer, ())
        if isinstance(output, Tensor):
            return output, []
        return output[0], [output[number] for number in self.facts.handed]

    def call_layer(self, layer_idx: int, hidden: Tensor, arguments: LayerArguments) -> Any:
        """All that the layer itself gives."""
        return arguments.call(self._forwards[layer_idx], hidden)

    def run(self, run: Run, ids: Tensor, positions: Tensor, cache: object) -> Tensor:
        """The logits of a run."""
        options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if self._cache_name:
            options[self._cache_name] = None if self.makes_cache else cache
        if self._takes_positions:
            options["position_ids"] = positions
        if self._cuts_logits and run.num_logits:
            options["logits_to_keep"] = run.num_logits
        with self._running(run):
            output = self.model(input_ids=ids, **options)
        if self.makes_cache:
            self.made_cache = type(getattr(output, self._cache_name, None))
        logits: Tensor = output["logits"] if isinstance(output, Mapping) else output[0]
        return logits

    @contextmanager
    def _running(self, run: Run) -> Iterator[None]:
        """Run it with the rows that are wanted for the embedding's table: models ask it where it
        is.
        """
        parameters: Any = self._embedding._parameters
        table = parameters["weight"]
        self._run, parameters["weight"] = run, run.rows
        try:
            yield
        finally:
            self._run, parameters["weight"] = None, table

    def _embed(self, ids: Tensor) -> Tensor:
        """The embedding's own forward, on a table of the rows that are wanted."""
        assert self._run is not None, "the model is run here alone"
        rows = self._run.rows
        if ids.device != rows.device or ids.numel() != len(rows):
            raise self.error("looks up other embeddings than those of its input")
        numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        embedded: Tensor = self._embed_forward(numbers)
        return embedded

    def _stand_in(self, layer_idx: int) -> Callable[..., Any]:
        names = list(inspect.signature(self._forwards[layer_idx]).parameters)

        def forward(*args: Any, **options: Any) -> Any:
            run = self._run
            assert run is not None, "the model is run here alone"
            if args:
                hidden, arguments = args[0], LayerArguments(args[1:], options, "")
            else:
                rest = {key: value for key, value in options.items() if key != names[0]}
                hidden, arguments = options[names[0]], LayerArguments((), rest, names[0])
            if run.hidden is None:
                run.hidden = hidden
            run.found[layer_idx] = arguments
            run.num_calls += 1
            return run.answer(layer_idx, hidden, arguments)

        return forward

    def _as_returned(self, layer_idx: int, hidden: Tensor, given: LayerArguments) -> Any:
        facts, places = self.facts, self.facts.places[layer_idx]
        others: dict[int, Any] = {n: torch.empty(0, device=self.device) for n in facts.handed}
        if places.argument is not None:
            others[places.number] = given.at(places.argument)
        return as_returned(hidden, facts.returned[layer_idx], others)

    def _check_called(self, layer_idx: int) -> None:
        """Raises UnsupportedError for a layer that was not called when the model was followed."""
        if layer_idx not in self.facts.called:
            raise self.error(f"calls layer {layer_idx}, which it does not for a text alone")

    def _check_here(self, *values: Tensor) -> None:
        """Raises UnsupportedError for what was made without data in a run with data: a model that
        asks where a parameter is that is not bound.
        """
        if self.device.type != "meta" and any(value.is_meta for value in values):
            raise self.error("moves what it computes to where its layers are")

    def error(self, what: str) -> UnsupportedError:
        """The error for a model that cannot be run so."""
        return UnsupportedError(
            f"{type(self.model).__name__} {what}",
            hint="a model is run layer by layer; this one is not made so",
        )


def as_returned(hidden: Tensor, count: int, others: Mapping[int, Any]) -> Any:
    """Hidden states as a layer returns them that gives `count` values, those of `others` by their
    numbers; -1: as they are.
    """
    if count < 0:
        return hidden
    return (hidden, *(others.get(number) for number in range(1, count)))
