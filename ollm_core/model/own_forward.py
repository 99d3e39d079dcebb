"""Follows a model's own forward, for models of which core does not know what they do around their
layers: embeddings with positions or norms, masks, biases of attention, heads of several parts.

The forward is transformers' own, run with stand-ins for its layers. Up to a layer it tells what
that layer is called with; from the last layer on it makes logits. Nothing is declared, and whatever
the model computes there is computed. What this takes for granted is looked at when a model is
opened: each layer gives hidden states to the next one, and is given nothing else that depends on
another layer. A model in which that does not hold is refused.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ollm_core.contracts.model import Layout
from ollm_core.errors import UnsupportedError, one_line
from ollm_core.memory.tracker import OneExpertTaken, OperationMode, tensors_in
from ollm_core.model.layer_memory import LayerMemory, layer_maker, new_cache, remembered
from ollm_core.model.operation_modes import AllAreTrue, Marks

_CACHES = ("past_key_values", "cache_params")
"""What models call the cache that they are given."""
_TRIED = 5
"""Tokens of the run that is followed when a model is opened."""


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

    def call(self, forward: Callable[..., Any], hidden: Tensor) -> Any:
        """What `forward` gives for `hidden`."""
        if self.name:
            return forward(*self.args, **{**self.options, self.name: hidden})
        return forward(hidden, *self.args, **self.options)


class _Reached(Exception):
    """Leaves the forward at the layer that was asked for."""


@dataclass(slots=True)
class _Run:
    """One run of the forward: what its parts answer."""

    rows: Tensor
    """[R * T, C], of the embedding."""
    last: int = -1
    """The forward is left at this layer; -1: not."""
    output: Tensor | None = None
    """What the last layer gives; None: what it is given."""
    num_logits: int = 0
    """Rows of the head's input that count, from the end; 0: all."""
    real: bool = False
    """Whether layers compute."""
    hidden: Tensor | None = None
    """What the first layer is given."""
    found: list[LayerArguments] = field(default_factory=list)


class OwnForward:
    """The forward of one model whose layers are called by somebody else."""

    def __init__(self, model: Any, layout: Layout, layers: Sequence[nn.Module]) -> None:
        """Puts stand-ins for `layers` and the embedding into `model`."""
        self._model = model
        self._run: _Run | None = None
        self._forwards: list[Callable[..., Any]] = [layer.forward for layer in layers]
        self._layers = layers
        self._makes: list[int] = [-1] * len(layers)
        """How many values each layer returns; -1: hidden states as they are."""
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
        self._new_layers = [layer_maker(one) for one in new_cache(model.config).layers]
        self.memories: tuple[LayerMemory, ...] = ()
        """What each layer remembers, once it was `followed`."""
        self.answers: Callable[[], OperationMode] = OneExpertTaken
        """What answers questions about data while the model is traced without."""
        self.shares = False
        """Whether layers hand something to later ones in a dictionary, as keys that these share."""
        self.uses_embedding = True
        """Whether layers or the head are given what depends on the embedding, beside hidden
        states.
        """
        self.device = torch.device("meta")
        """Where the model is run."""
        self.width = 0
        """Numbers in the hidden states of one token between layers."""
        self.dtype = torch.float32
        """What the model computes in, keys and values too."""
        self.converted: dict[str, torch.dtype] = {}
        """Constants that the model converts when it is first run, and keeps so, by name."""
        self.hidden_dtypes: frozenset[torch.dtype] = frozenset()
        """Those of hidden states between layers: some models add up in float32."""
        self._shape: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        """That of hidden states, before and after rows and tokens."""

    @property
    def embedding_size(self) -> int:
        """Numbers in a row of the embedding."""
        return int(self._embedding.weight.shape[-1])

    def new_layer(self, layer_idx: int) -> Any:
        """An empty layer of transformers' cache of the model."""
        return self._new_layers[layer_idx]()

    @property
    def num_layers(self) -> int:
        """How many there are."""
        return len(self._layers)

    def enter(
        self, ids: Tensor, positions: Tensor, rows: Tensor, cache: object, last: int = -1
    ) -> tuple[Tensor, list[LayerArguments]]:
        """What the first layer is given, and what all layers up to `last` are called with; -1: all.

        `ids` and `positions` [R, T], `rows` [R * T, C] of the embedding table, `cache` of the past.
        """
        run = _Run(rows, last if last >= 0 else self.num_layers - 1)
        with self._running(run), suppress(_Reached):
            self._forward(ids, positions, cache)
        assert run.hidden is not None, "the forward was followed when the model was opened"
        for one in run.found:
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
        run = _Run(rows, output=hidden, num_logits=num_logits)
        with self._running(run):
            output = self._forward(ids, positions, cache)
        logits = _logits(output)
        self._check_here(logits)
        if not self._cuts_logits:  # all are made, as products of other shapes have other last bits
            logits = logits[:, -num_logits:].clone()
        return logits

    def call(self, layer_idx: int, hidden: Tensor, arguments: LayerArguments) -> Tensor:
        """The layer itself."""
        output = arguments.call(self._forwards[layer_idx], hidden)
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        return first

    def follow(self, dtype: torch.dtype, mixtures: Sequence[Any]) -> None:
        """Run the forward of a model on the meta device to see that it can be followed. Raises
        UnsupportedError, naming what cannot.
        """
        failed: Exception | None = None
        if not self._cache_name:
            raise self._error("takes no cache of transformers")
        self.dtype, self.hidden_dtypes = dtype, frozenset({dtype})
        for answers in (OneExpertTaken, AllAreTrue):
            self.answers = answers
            try:
                self._follow(dtype, mixtures)
            except UnsupportedError:
                raise
            except Exception as error:  # noqa: BLE001 - a model's code may raise anything
                failed = failed or error
            else:
                return
        assert failed is not None, "it was followed otherwise"
        raise self._error(
            f"cannot be followed layer by layer: {one_line(failed)}{_where(failed)}"
        ) from failed

    def _follow(self, dtype: torch.dtype, mixtures: Sequence[Any]) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.answers())
            for mixture in mixtures:
                stack.enter_context(mixture.idle())
            before = dict(_held(self._model))
            versions = {name: _version(value) for name, value in before.items()}
            self._try_real(dtype)
            after = dict(_held(self._model))
            self._try_apart(dtype)
            for name, value in _held(self._model):
                if before.get(name) is value and versions[name] == _version(value):
                    continue
                if not _is_converted(before.get(name), value, after.get(name)):
                    raise self._error(
                        f"keeps what it has computed in {name}, where another sequence finds it"
                    )
                self.converted[name] = value.dtype

    def _try_real(self, dtype: torch.dtype) -> None:
        """Two steps with layers that compute: what they return and what they remember."""
        cache = new_cache(self._model.config)
        if len(cache.layers) != self.num_layers:
            raise self._error(f"has {len(cache.layers)} caches for {self.num_layers} layers")
        for start, count in ((0, _TRIED), (_TRIED, 1)):
            run = _Run(self._empty_rows(count, dtype), real=True)
            with self._running(run):
                self._forward(*_tokens(start, count), cache)
            if len(run.found) != self.num_layers:
                raise self._error(f"calls {len(run.found)} of its {self.num_layers} layers")
            if start == 0:
                self._given = [one.present for one in run.found]
                self.memories = tuple(
                    remembered(layer, i, dtype, type(self._model).__name__)
                    for i, layer in enumerate(cache.layers[: self.num_layers])
                )
        if all(memory.kind.kind == "none" for memory in self.memories):
            raise self._error("keeps nothing of earlier tokens")
        after = [
            remembered(layer, i, dtype, type(self._model).__name__)
            for i, layer in enumerate(cache.layers[: self.num_layers])
        ]
        if len(after) != self.num_layers or tuple(after) != self.memories:
            raise self._error("has layers whose state changes its shape from step to step")

    def _try_apart(self, dtype: torch.dtype) -> None:
        """Once with stand-ins: what each layer is given depends on no other one, but for the hidden
        states, which are those of the layer before.
        """
        marks = Marks()
        rows = self._empty_rows(_TRIED, dtype)
        given: list[Tensor] = []

        def standing_in(layer_idx: int, hidden: Tensor, arguments: LayerArguments) -> Tensor:
            if arguments.present != self._given[layer_idx]:
                raise self._error(f"gives layer {layer_idx} what another layer returns")
            if layer_idx and hidden is not given[-1]:
                raise self._error(f"computes between layers {layer_idx - 1} and {layer_idx}")
            for value in tensors_in(arguments.args, arguments.options):
                if "layer" in marks.of(value):
                    raise self._error(f"gives layer {layer_idx} what another layer computed")
                uses.update(marks.of(value))
            if layer_idx == 0:
                self._note_shape(hidden)
            elif hidden.shape != given[0].shape:
                raise self._error("changes the size of hidden states from layer to layer")
            output = torch.empty_like(hidden)
            marks.add(output, "layer" if layer_idx < self.num_layers - 1 else "last")
            given.append(output)
            return output

        uses: set[str] = set()
        marks.add(rows, "embedding")
        run = _Run(rows)
        self._watch = standing_in
        try:
            with self._running(run), marks:
                output = self._forward(*_tokens(0, _TRIED), new_cache(self._model.config))
        finally:
            self._watch = None
        if len(run.found) != self.num_layers:
            raise self._error("calls its layers more or less than once each")
        logits = _logits(output)
        if "layer" in marks.of(logits):
            raise self._error("makes logits of more than what its last layer gives")
        self.uses_embedding = "embedding" in (uses | marks.of(logits))

    _given: Sequence[tuple[object, ...]] = ()
    _watch: Callable[[int, Tensor, LayerArguments], Tensor] | None = None

    def hidden_shape(self, num_rows: int, num_tokens: int) -> tuple[int, ...]:
        """That of hidden states between layers, mostly [R, T, C]."""
        before, after = self._shape
        return *before, num_rows, num_tokens, *after

    def _note_shape(self, hidden: Tensor) -> None:
        shape = tuple(hidden.shape)
        for i in range(len(shape) - 1):
            if shape[i : i + 2] == (1, _TRIED):
                self._shape = shape[:i], shape[i + 2 :]
                self.width = hidden.numel() // _TRIED
                return
        raise self._error(f"has hidden states of the shape {list(shape)}")

    def _empty_rows(self, count: int, dtype: torch.dtype) -> Tensor:
        size = self._embedding.weight.shape[-1]
        return torch.empty(count, size, dtype=dtype, device="meta")

    def _forward(self, ids: Tensor, positions: Tensor, cache: object) -> Any:
        options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if self._cache_name:
            options[self._cache_name] = cache
        if self._takes_positions:
            options["position_ids"] = positions
        if self._cuts_logits and self._run is not None and self._run.num_logits:
            options["logits_to_keep"] = self._run.num_logits
        return self._model(input_ids=ids, **options)

    @contextmanager
    def _running(self, run: _Run) -> Iterator[None]:
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
            raise self._error("looks up other embeddings than those of its input")
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
            if layer_idx == 0:
                run.hidden = hidden
            run.found.append(arguments)
            if run.real:
                return self._real(layer_idx, hidden, arguments)
            if layer_idx == run.last:
                raise _Reached
            output = hidden
            if self._watch is not None:
                output = self._watch(layer_idx, hidden, arguments)
            elif run.output is not None and layer_idx == self.num_layers - 1:
                output = run.output
            count = self._makes[layer_idx]
            return output if count < 0 else (output, *[None] * (count - 1))

        return forward

    def _real(self, layer_idx: int, hidden: Tensor, arguments: LayerArguments) -> Any:
        shared = [one for one in arguments.options.values() if isinstance(one, MutableMapping)]
        before = [len(one) for one in shared]
        output = arguments.call(self._forwards[layer_idx], hidden)
        self.shares |= before != [len(one) for one in shared]
        first = output if isinstance(output, Tensor) else output[0]
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            raise self._error(f"has a layer {layer_idx} that gives no hidden states")
        self.hidden_dtypes |= {hidden.dtype, first.dtype}
        self._makes[layer_idx] = -1 if isinstance(output, Tensor) else len(output)
        return output

    def _check_here(self, *values: Tensor) -> None:
        """Raises UnsupportedError for what was made without data in a run with data: a model that
        asks where a parameter is that is not bound.
        """
        if self.device.type != "meta" and any(value.is_meta for value in values):
            raise self._error("moves what it computes to where its layers are")

    def _error(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{type(self._model).__name__} {what}",
            hint="a model is run layer by layer; this one is not made so",
        )


def _where(error: Exception) -> str:
    """The code of a model that has raised `error`, in words."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    models = [one.f_code for one in frames if "/transformers/models/" in one.f_code.co_filename]
    return f", in {models[-1].co_qualname}" if models else ""


def _logits(output: Any) -> Tensor:
    """Those that a model's forward returns."""
    found: Tensor = output["logits"] if isinstance(output, Mapping) else output[0]
    return found


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules hold beside parameters, by name."""
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}", value


def _version(value: Tensor) -> int:
    """How often a tensor was written into."""
    return 0 if value.is_inference() else value._version


def _is_converted(before: Tensor | None, now: Tensor, once: Tensor | None) -> bool:
    """Whether a model has only converted a constant to its own dtype: `once`, and then no more."""
    return (
        now is once
        and before is not None
        and before.shape == now.shape
        and before.dtype != now.dtype
        and before.is_floating_point()
        and now.is_floating_point()
    )


def _tokens(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Ids and positions [1, T] without data."""
    ids = torch.zeros(1, count, dtype=torch.long, device="meta")
    return ids, torch.arange(start, start + count, device="meta")[None]
