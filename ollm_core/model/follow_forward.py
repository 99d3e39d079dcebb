"""Follows a model's own forward when the model is opened: each layer must give hidden states to the
next one, with other values that it returns or without, and be given nothing else that depends on
another layer.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ollm_core.errors import UnsupportedError, one_line
from ollm_core.memory.tracker import OneExpertTaken, OperationMode, tensors_in
from ollm_core.model.layer_memory import LayerMemory, remembered
from ollm_core.model.operation_modes import AllAreTrue, Marks
from ollm_core.model.own_forward import (
    Facts,
    LayerArguments,
    OwnForward,
    Run,
    SharedPair,
    as_returned,
)
from ollm_core.model.own_states import StatePlaces, attributes_of, states_in

_TRIED = 5
"""Tokens of the run that is followed."""


def follow_forward(own: OwnForward, dtype: torch.dtype, mixtures: Sequence[Any]) -> Facts:
    """Run the forward of a model on the meta device to see that it can be followed. Raises
    UnsupportedError, naming what cannot.
    """
    failed: Exception | None = None
    if not own.takes_cache:
        raise own.error("takes no cache of transformers")
    for own.makes_cache, answers in itertools.product((False, True), (OneExpertTaken, AllAreTrue)):
        follower = _Follower(own, dtype)
        try:
            with ExitStack() as stack:
                stack.callback(follower.forget)
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                stack.enter_context(answers())
                for mixture in mixtures:
                    stack.enter_context(mixture.idle())
                follower.follow()
        except UnsupportedError:
            raise
        except Exception as error:  # noqa: BLE001 - a model's code may raise anything
            failed = failed or error
        else:
            return follower.facts(answers)
    own.makes_cache = False
    assert failed is not None, "it was followed otherwise"
    where = _where(failed)
    raise own.error(f"cannot be followed layer by layer: {one_line(failed)}{where}") from failed


class _Follower:
    """Runs the forward of one model, and writes down what it sees."""

    def __init__(self, own: OwnForward, dtype: torch.dtype) -> None:
        self._own = own
        self._dtype = dtype
        self._memories: tuple[LayerMemory, ...] = ()
        self._returned = [-1] * own.num_layers
        self._called: tuple[int, ...] = ()
        self._given: dict[int, tuple[object, ...]] = {}
        self._before: tuple[Any, ...] = ()
        self._places = [StatePlaces()] * own.num_layers
        self._states: list[list[Tensor]] = [[] for _ in range(own.num_layers)]
        self._handed: dict[int, int | str] = {}
        self._sizes: list[tuple[torch.Size, torch.dtype]] = []
        self._hidden_dtypes = {dtype}
        self._shared: dict[tuple[str, Hashable], SharedPair] = {}
        self._continues = True
        self._uses: set[str] = set()
        self._shape: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        self._width = 0
        self._converted: dict[str, torch.dtype] = {}

    def facts(self, answers: type[OperationMode]) -> Facts:
        """What was seen."""
        return Facts(
            self._memories,
            answers,
            self._called,
            tuple(self._returned),
            self._handed,
            tuple(self._places),
            tuple(self._shared.values()),
            self._continues,
            "embedding" in self._uses,
            self._dtype,
            frozenset(self._hidden_dtypes),
            self._shape,
            self._width,
            self._converted,
        )

    def follow(self) -> None:
        """See `follow_forward`."""
        before = dict(_held(self._own.model))
        versions = {name: _version(value) for name, value in before.items()}
        self._try_real()
        after = dict(_held(self._own.model))
        if any(memory.kind.states for memory in self._memories):
            self._try_continuing()
        self.forget()
        self._try_apart()
        for name, value in _held(self._own.model):
            if before.get(name) is value and versions[name] == _version(value):
                continue
            if not _is_converted(before.get(name), value, after.get(name)):
                raise self._own.error(
                    f"keeps what it has computed in {name}, where another sequence finds it"
                )
            self._converted[name] = value.dtype

    def forget(self) -> None:
        """Let layers be as they were before the first token."""
        for layer, places in zip(self._own.layers, self._places, strict=True):
            places.put(layer, ())

    def _try_real(self) -> None:
        """Two steps with layers that compute: what they return and what they remember."""
        own = self._own
        cache = own.new_cache()
        if len(cache.layers) != own.num_layers:
            raise own.error(f"has {len(cache.layers)} caches for {own.num_layers} layers")
        for start, count in ((0, _TRIED), (_TRIED, 1)):
            run = Run(self._empty_rows(count), self._real)
            own.run(run, *_tokens(start, count), cache)
            called = tuple(run.found)
            if run.num_calls != len(called) or called != tuple(sorted(called)) or not called:
                raise own.error(f"makes {run.num_calls} calls of {len(called)} layers")
            if start and called != self._called:
                raise own.error("calls other layers from step to step")
            self._called = called
            if own.makes_cache and own.made_cache and issubclass(own.made_cache, Cache):
                self._check_cache(own.made_cache.__name__)
            if start == 0:
                self._given = {i: one.present for i, one in run.found.items()}
                self._memories = self._remembered(cache)
        if all(memory.kind.kind == "none" for memory in self._memories):
            raise own.error("keeps nothing of earlier tokens")
        if len(cache.layers) != own.num_layers or self._remembered(cache) != self._memories:
            raise own.error("has layers whose state changes its shape from step to step")

    def _check_cache(self, kind: str) -> None:
        """Raises for a model that does with a cache of this `kind`, which it makes, what it does
        not with the one that it is given.
        """
        own = self._own
        if kind != DynamicCache.__name__:
            raise own.error(f"keeps its past in a {kind}, not in transformers' usual cache")
        if own.num_caches > own.num_layers:
            raise own.error(f"has {own.num_caches} caches for {own.num_layers} layers")
        raise ValueError(kind)

    def _try_continuing(self) -> None:
        """A second call of several tokens: whether what each layer gives depends on its states."""
        own, marks = self._own, Marks()
        cache = own.new_cache()
        own.run(Run(self._empty_rows(_TRIED), self._real), *_tokens(0, _TRIED), cache)

        def alone(layer_idx: int, hidden: Tensor, arguments: LayerArguments) -> Any:
            hidden = torch.empty_like(hidden)  # of no other layer
            if layer_idx:
                arguments = arguments.replaced(
                    {one: torch.empty_like(arguments.at(one)) for one in self._handed.values()}
                )
            places = self._places[layer_idx]
            states = [torch.empty_like(state) for state in self._states[layer_idx]]
            for i, state in enumerate(states):
                marks.add(state, f"{i}")
            places.put(self._own.layers[layer_idx], states)
            if places.argument is not None:
                arguments = arguments.replaced({places.argument: tuple(states)})
            output = self._own.call_layer(layer_idx, hidden, arguments)
            first = output if isinstance(output, Tensor) else output[0]
            memory = self._memories[layer_idx]
            seen = marks.of(first)
            self._continues &= all(f"{i}" in seen for i in range(len(self._states[layer_idx])))
            self._continues &= not memory.convolutions or "convolution" in marks.of(first)
            self._continues &= not memory.recurrences or "recurrence" in marks.of(first)
            return output

        for memory, layer in zip(self._memories, cache.layers, strict=True):
            convolutions, recurrences = memory.states_by_kind(layer)
            for state in convolutions:
                marks.add(state, "convolution")
            for state in recurrences:
                marks.add(state, "recurrence")
        with marks:
            own.run(Run(self._empty_rows(_TRIED), alone), *_tokens(_TRIED, _TRIED), cache)

    def _remembered(self, cache: Any) -> tuple[LayerMemory, ...]:
        name = type(self._own.model).__name__
        return tuple(
            remembered(layer, i, self._dtype, name, self._states[i])
            for i, layer in enumerate(cache.layers)
        )

    def _real(self, layer_idx: int, hidden: Tensor, arguments: LayerArguments) -> Any:
        """The layer itself."""
        self._note_handed(layer_idx, arguments)
        before = {place: set(one) for place, one in arguments.mappings.items()}
        layer, places = self._own.layers[layer_idx], self._places[layer_idx]
        if places.argument is not None:
            states = tuple(self._states[layer_idx])
            arguments = arguments.replaced({places.argument: states})
        held = dict(attributes_of(layer))
        output = self._own.call_layer(layer_idx, hidden, arguments)
        self._note_states(layer_idx, held, arguments, output)
        for place, mapping in arguments.mappings.items():
            for key in mapping.keys() - before[place]:
                self._note_shared(layer_idx, place, key, mapping[key])
        first = output if isinstance(output, Tensor) else output[0]
        if not isinstance(first, Tensor) or first.shape != hidden.shape:
            raise self._own.error(f"has a layer {layer_idx} that gives no hidden states")
        self._hidden_dtypes |= {hidden.dtype, first.dtype}
        self._returned[layer_idx] = -1 if isinstance(output, Tensor) else len(output)
        self._before = () if isinstance(output, Tensor) else tuple(output)
        return output

    def _note_states(
        self,
        layer_idx: int,
        held: Mapping[tuple[str, str], Tensor | None],
        arguments: LayerArguments,
        output: Any,
    ) -> None:
        """Where the layer has kept something beside the cache; `held` are the attributes before."""
        layer, places = self._own.layers[layer_idx], self._places[layer_idx]
        if not places:  # in the first step
            filled = (
                key
                for key, value in attributes_of(layer)
                if isinstance(value, Tensor) and key in held and held[key] is None
            )
            places = StatePlaces(tuple(filled))
            if self._own.makes_cache:
                for place in (*range(len(arguments.args)), *arguments.options):
                    if number := states_in(arguments.at(place), output):
                        places = StatePlaces(argument=place, number=number)
            self._places[layer_idx] = places
        given = None if places.argument is None else arguments.at(places.argument)
        self._states[layer_idx] = places.taken(layer, given, output)

    def _note_shared(self, layer_idx: int, place: str, key: Hashable, pair: Any) -> None:
        """What a layer has put where later ones find it: keys and values [1, G, T, D]."""
        if any(not isinstance(one, Tensor) or one.dim() != 4 for one in pair):
            raise self._own.error("hands something else to later layers than keys and values")
        sizes = tuple((one.shape[1], one.shape[3]) for one in pair)
        self._shared[place, key] = SharedPair(layer_idx, place, key, sizes)

    def _note_handed(self, layer_idx: int, arguments: LayerArguments) -> None:
        """Of what the layer before has returned beside hidden states, what this one is given."""
        places = [*range(len(arguments.args)), *arguments.options]
        found: dict[int, int | str] = {
            number: place
            for number, value in enumerate(self._before)
            for place in places
            if number and isinstance(value, Tensor) and arguments.at(place) is value
        }
        sizes = [(self._before[number].shape, self._before[number].dtype) for number in found]
        if layer_idx == 0:
            return
        if layer_idx == 1:
            self._handed, self._sizes = found, sizes
        elif found != self._handed or sizes != self._sizes:
            raise self._own.error("hands different values on from layer to layer")

    def _try_apart(self) -> None:
        """Once with stand-ins: what each layer is given depends on no other one, but for the hidden
        states, which are those of the layer before.
        """
        own, marks = self._own, Marks()
        rows = self._empty_rows(_TRIED)
        given: list[Tensor] = []
        handed: dict[int, Tensor] = {}

        def stand_in(layer_idx: int, hidden: Tensor, arguments: LayerArguments) -> Any:
            if arguments.present != self._given.get(layer_idx):
                raise own.error(f"gives layer {layer_idx} what another layer returns")
            if given and hidden is not given[-1]:
                raise own.error(f"computes between layers {layer_idx - 1} and {layer_idx}")
            if layer_idx:
                for number, place in self._handed.items():
                    if arguments.at(place) is not handed[number]:
                        raise own.error(f"computes between layers {layer_idx - 1} and {layer_idx}")
            for value in tensors_in(arguments.args, arguments.options):
                if any(value is one for one in handed.values()):
                    continue
                if "layer" in marks.of(value):
                    raise own.error(f"gives layer {layer_idx} what another layer computed")
                self._uses.update(marks.of(value))
            if not given:
                self._note_shape(hidden)
            elif hidden.shape != given[0].shape:
                raise own.error("changes the size of hidden states from layer to layer")
            others: dict[int, Any] = {}
            if (places := self._places[layer_idx]).argument is not None:
                others[places.number] = arguments.at(places.argument)
            output = torch.empty_like(hidden)
            marks.add(output, "last" if layer_idx == self._called[-1] else "layer")
            given.append(output)
            for number in self._handed:
                handed[number] = torch.empty(0, device="meta")
                marks.add(handed[number], "layer")
            return as_returned(output, self._returned[layer_idx], handed | others)

        marks.add(rows, "embedding")
        run = Run(rows, stand_in)
        with marks:
            logits = own.run(run, *_tokens(0, _TRIED), own.new_cache())
        if tuple(run.found) != self._called or run.num_calls != len(self._called):
            raise own.error("calls its layers more or less than once each")
        if "layer" in marks.of(logits):
            raise own.error("makes logits of more than what its last layer gives")
        self._uses.update(marks.of(logits))

    def _note_shape(self, hidden: Tensor) -> None:
        shape = tuple(hidden.shape)
        for i in range(len(shape) - 1):
            if shape[i : i + 2] == (1, _TRIED):
                self._shape = shape[:i], shape[i + 2 :]
                self._width = hidden.numel() // _TRIED
                return
        raise self._own.error(f"has hidden states of the shape {list(shape)}")

    def _empty_rows(self, count: int) -> Tensor:
        return torch.empty(count, self._own.embedding_size, dtype=self._dtype, device="meta")


def _where(error: Exception) -> str:
    """The code of a model that has raised `error`, in words."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    models = [one.f_code for one in frames if "/transformers/models/" in one.f_code.co_filename]
    return f", in {models[-1].co_qualname}" if models else ""


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
