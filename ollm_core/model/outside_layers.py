"""What a model computes outside its layers, seen in transformers' own forward.

Core looks up embedding rows, runs layers, the final norm and the head. Families do more there:
Granite multiplies rows and divides logits, Gemma scales rows and caps logits, Cohere scales logits.
So the model's own forward is run once, without data and with stand-ins for its layers, and every
operation is watched. Those that treat each number by itself, with constants, are kept and run again
in each pass; anything else that lies between what core runs is refused by name. A family declares
nothing for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ollm_core.contracts.model import Layout
from ollm_core.errors import UnsupportedError
from ollm_core.memory.tracker import OperationMode

_ATEN = torch.ops.aten
_IN_PLACE: Mapping[Any, Any] = {
    _ATEN.add.Tensor: _ATEN.add_.Tensor,
    _ATEN.clamp.default: _ATEN.clamp_.default,
    _ATEN.div.Tensor: _ATEN.div_.Tensor,
    _ATEN.mul.Tensor: _ATEN.mul_.Tensor,
    _ATEN.sub.Tensor: _ATEN.sub_.Tensor,
    _ATEN.tanh.default: _ATEN.tanh_.default,
}
"""Operations on each number by itself, and the same in place: equal bits, and no memory."""
_COMMUTATIVE = frozenset({_ATEN.add.Tensor, _ATEN.mul.Tensor})
_SAME = frozenset(
    {
        _ATEN._unsafe_view.default,
        _ATEN._to_copy.default,
        _ATEN.alias.default,
        _ATEN.clone.default,
        _ATEN.detach.default,
        _ATEN.expand.default,
        _ATEN.slice.Tensor,
        _ATEN.view.default,
    }
)
"""Operations that change nothing where shape and dtype stay."""
_LENGTHS = (3, 5)
"""Tokens of the runs that are watched: what depends on the length is seen by comparing them."""
_KNOWN_OPTIONS = frozenset(
    {"attention_mask", "cache_position", "past_key_values", "position_embeddings", "position_ids"}
)
"""What core gives to a layer beside hidden states; positions by their values alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation on each number of a tensor by itself."""

    in_place: Any
    """The aten overload that changes its first argument."""
    constants: tuple[Any, ...]
    """Its other arguments: numbers, or tensors of no dimension on the CPU."""
    options: Mapping[str, Any]

    def __call__(self, values: Tensor) -> None:
        """Change `values`, of any shape, in place."""
        self.in_place(values, *self.constants, **self.options)

    def __str__(self) -> str:
        """As it was seen, for instance `mul(12.0)`: equal for equal operations."""
        shown = [
            f"{one.dtype} {one.item()!r}" if isinstance(one, Tensor) else repr(one)
            for one in (*self.constants, *self.options.values())
        ]
        name = str(self.in_place.overloadpacket).removeprefix("aten.").removesuffix("_")
        return f"{name}({', '.join(shown)})"


@dataclass(frozen=True, slots=True)
class OutsideLayers:
    """The operations of one model between the parts that core runs, in their order."""

    after_embedding: tuple[Operation, ...] = ()
    """On the rows of the embedding, before the first layer."""
    before_norm: tuple[Operation, ...] = ()
    """On what the last layer gives."""
    before_head: tuple[Operation, ...] = ()
    """On what the final norm gives."""
    after_head: tuple[Operation, ...] = ()
    """On logits."""

    def __str__(self) -> str:
        parts = self.after_embedding, self.before_norm, self.before_head, self.after_head
        return "; ".join(" ".join(map(str, part)) for part in parts)


def apply(operations: Sequence[Operation], values: Tensor) -> Tensor:
    """`values` after `operations`, which change it in place."""
    for operation in operations:
        operation(values)
    return values


_KNOWN: ContextVar[MutableMapping[Hashable, OutsideLayers] | None] = ContextVar(
    "what was seen of models before", default=None
)


@contextmanager
def remembering_outside(known: MutableMapping[Hashable, OutsideLayers]) -> Iterator[None]:
    """In the `with`, a model is not watched of which `known`, which is empty at first, has what was
    seen of another of its class, config, dtype and layout: for tests that open one model again and
    again.
    """
    token = _KNOWN.set(known)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def watch_outside(
    model: nn.Module, layout: Layout, rotary_types: Sequence[str | None]
) -> OutsideLayers:
    """What `model`, whose parameters are on the meta device, computes outside its layers.

    `rotary_types` are those that core passes to the rotary module, by layer. Raises
    UnsupportedError, naming it, for anything that core would leave out.
    """
    _give_buffers(model, layout)
    known = _KNOWN.get()
    if known is None:
        return _watch(model, layout, rotary_types)
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    key = type(model), config.to_json_string(), dtype, layout, tuple(rotary_types)
    if key not in known:
        known[key] = _watch(model, layout, rotary_types)
    return known[key]


def _watch(model: nn.Module, layout: Layout, rotary_types: Sequence[str | None]) -> OutsideLayers:
    try:
        first, other = (_Watched(model, layout, rotary_types).run(n) for n in _LENGTHS)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"the forward of {type(model).__name__} cannot be followed: "
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            hint="the layout must name the embedding, layers, norm, rotary module and head that "
            "transformers' own forward uses",
        ) from error
    if str(first) != str(other):
        raise _unsupported(model, f"computes by the number of tokens: {first}, and {other}")
    return first


def _give_buffers(model: Any, layout: Layout) -> None:
    """Values for the buffers outside the layers, which are in no checkpoint: as transformers
    initialises them when it loads a model.
    """
    for path, module in model.named_modules():
        missing = [n for n, value in module._buffers.items() if value is not None and value.is_meta]
        if not missing or path == layout.rotary:
            continue
        where = f"{path}.{missing[0]}".removeprefix(".")
        if path.startswith(f"{layout.layers}."):
            raise _unsupported(model, f"has the buffer {where} in a layer")
        if not module._non_persistent_buffers_set.issuperset(missing):
            raise _unsupported(model, f"takes the buffer {where} from its checkpoint")
        for name in missing:
            module._buffers[name] = torch.full_like(module._buffers[name], -1, device="cpu")
        model._init_weights(module)


class _Watcher(OperationMode):
    """Follows values from where they begin through operations that are understood."""

    def __init__(self, starts: Callable[[Any, tuple[Any, ...]], str]) -> None:
        """`starts` tells, of a call of an overload, the name of what begins with its result, or
        "".
        """
        super().__init__()
        self._starts = starts
        self._values: dict[int, tuple[str, tuple[Operation, ...]]] = {}
        self._unknown: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id is one tensor's for as long as that lives

    def begin(self, value: Tensor, name: str) -> None:
        """From here on `value` is `name`."""
        self._alive.append(value)
        self._values[id(value)] = name, ()
        self._unknown.pop(id(value), None)

    def told(self, value: Tensor) -> tuple[str, tuple[Operation, ...]]:
        """Where `value` begins and what was done to it. Raises LookupError, saying what it is."""
        if id(value) not in self._values:
            raise LookupError(self._unknown.get(id(value), "something else"))
        return self._values[id(value)]

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if name := self._starts(func, args):
            self.begin(result, name)
            return result
        followed = [place for place, one in enumerate(args) if id(one) in self._values]
        unknown = [self._unknown[id(one)] for one in args if id(one) in self._unknown]
        if not followed and not unknown:
            return result
        self._alive.append(result)
        known = len(followed) == 1 and not unknown and self._follow(func, args, kwargs, result)
        if not known:
            origin = self._values[id(args[followed[0]])][0] if followed else unknown[0]
            self._values.pop(id(result), None)
            self._unknown[id(result)] = f"{func} of {origin}" if followed else origin
        return result

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> bool:
        """Whether `func` is understood; `result` is then known."""
        value, *others = args
        if func in _COMMUTATIVE and id(value) not in self._values:
            value, others = args[1], [args[0]]
        if id(value) not in self._values:
            return False
        if (value.shape, value.dtype) != (result.shape, result.dtype):
            return False
        name, done = self._values[id(value)]
        if func not in _SAME:
            plain = func if func in _IN_PLACE else _OUT_OF_PLACE.get(func)
            if plain is None or not all(map(_is_constant, (*others, *kwargs.values()))):
                return False
            done = (*done, Operation(_IN_PLACE[plain], tuple(others), kwargs))
        self._values[id(result)] = name, done
        return True


_OUT_OF_PLACE = {in_place: plain for plain, in_place in _IN_PLACE.items()}


def _is_constant(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_meta
    return value is None or isinstance(value, (int, float))


class _Watched:
    """One watched run of a model's forward."""

    def __init__(
        self, model: nn.Module, layout: Layout, rotary_types: Sequence[str | None]
    ) -> None:
        self._model = model
        self._layout = layout
        self._rotary_types = rotary_types
        self._layers = list(model.get_submodule(layout.layers).children())
        self._embedding = model.get_submodule(layout.embedding)
        self._norm = model.get_submodule(layout.norm)
        self._rotary = model.get_submodule(layout.rotary)
        self._head = model.get_submodule(layout.head)
        self._ids = torch.empty(0)
        self._rotations: dict[str | None, list[int]] = {}
        """Ids of what the rotary module gave, by layer type."""
        self._found: dict[str, tuple[Operation, ...]] = {}
        """Operations before each part, by its name."""
        self._watcher = _Watcher(self._starts)

    def run(self, num_tokens: int) -> OutsideLayers:
        """Run it over `num_tokens`. Raises UnsupportedError."""
        if type(self._head).forward is not nn.Linear.forward:
            raise self._error(f"has a head that is a {type(self._head).__name__}")
        if getattr(self._head, "bias", None) is not None:
            raise self._error("has a head with a bias")
        self._ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
        self._positions = torch.arange(num_tokens, device="meta")[None]
        with torch.inference_mode(False), torch.no_grad(), self._stand_ins(), self._watcher:
            output = self._model(input_ids=self._ids, position_ids=self._positions, use_cache=False)
        names = ["layer 0", "the norm", "the head"]
        for name in (*(f"layer {i}" for i in range(len(self._layers))), *names[1:]):
            if name not in self._found:
                raise self._error(f"does not call {name}")
        self._arrive("logits", output.logits, "the head")
        return OutsideLayers(*(self._found[name] for name in (*names, "logits")))

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """In the `with`, layers only say what they are given, and other parts too."""
        with ExitStack() as stack:
            for i, layer in enumerate(self._layers):
                own = inspect.signature(layer.forward)
                layer.forward = self._stand_in(i, own)
                stack.callback(delattr, layer, "forward")
            for module, name, after in (
                (self._norm, "the norm", f"layer {len(self._layers) - 1}"),
                (self._head, "the head", "the norm"),
            ):
                hook = self._hook(name, after)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            stack.callback(
                self._rotary.register_forward_hook(self._rotated, with_kwargs=True).remove
            )
            yield

    def _stand_in(self, layer_idx: int, own: inspect.Signature) -> Callable[..., Tensor]:
        name, after = f"layer {layer_idx}", f"layer {layer_idx - 1}"

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            given = own.bind(*args, **kwargs).arguments
            hidden: Tensor = given.pop(next(iter(own.parameters)))
            options = {**given.pop("kwargs", {}), **given}
            if self._arrive(name, hidden, after if layer_idx else "the embedding") and layer_idx:
                told = " ".join(map(str, self._found[name]))
                raise self._error(f"computes between layers: {told}")
            self._check_options(layer_idx, options)
            output = torch.empty_like(hidden)
            self._watcher.begin(output, name)
            return output

        return forward

    def _check_options(self, layer_idx: int, options: Mapping[str, Any]) -> None:
        """Raises UnsupportedError for what a layer is given and core does not give."""
        for name, value in options.items():
            if value is None or isinstance(value, bool):
                continue
            if name not in _KNOWN_OPTIONS or name in ("attention_mask", "past_key_values"):
                raise self._error(f"gives layer {layer_idx} {name}, which core does not make")
            if name == "position_embeddings":
                kind = self._rotary_types[layer_idx]
                if [id(one) for one in value] != self._rotations.get(kind):
                    raise self._error(
                        f"gives layer {layer_idx} position_embeddings that are not those of "
                        f"{self._layout.rotary}"
                    )
            elif name == "position_ids" and not _is_part(value, self._positions):
                raise self._error(f"gives layer {layer_idx} position_ids that it has computed")

    def _hook(self, name: str, after: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
            values = [*args, *kwargs.values()]
            self._arrive(name, values[0], after)
            self._watcher.begin(output, name)

        return hook

    def _rotated(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given: list[Any] = [*args, *kwargs.values()]
        _, positions, *rest = given
        if not _is_part(positions, self._positions):
            raise self._error(f"gives {self._layout.rotary} positions that it has computed")
        self._rotations[rest[0] if rest else None] = [id(one) for one in output]
        self._watcher._alive += output

    def _arrive(self, name: str, value: Tensor, after: str) -> tuple[Operation, ...]:
        """What was done to `value` since it left `after`. Raises UnsupportedError if it comes from
        elsewhere, or not by known operations alone.
        """
        if name in self._found:
            raise self._error(f"calls {name} twice")
        try:
            origin, done = self._watcher.told(value)
        except LookupError as error:
            origin, done = str(error), ()
        if origin != after:
            raise self._error(f"gives {name} {origin}, expected what {after} gives")
        self._found[name] = done
        return done

    def _starts(self, func: Any, args: tuple[Any, ...]) -> str:
        if func is not _ATEN.embedding.default or not _is_part(args[0], self._embedding.weight):
            return ""
        if len(args) > 1 and args[1].numel() == self._ids.numel() and _is_part(args[1], self._ids):
            return "the embedding"
        return ""

    def _error(self, what: str) -> UnsupportedError:
        return _unsupported(self._model, what)


def _is_part(value: Tensor, whole: Any) -> bool:
    """Whether both have one storage."""
    same: bool = value.untyped_storage()._cdata == whole.untyped_storage()._cdata
    return same


def _unsupported(model: nn.Module, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} {what}",
        hint="core runs embedding, layers, final norm and head, and between them what treats each "
        "number by itself; a model that computes more there would give wrong tokens",
    )
