"""States that a layer keeps beside transformers' cache: as attributes of its modules, or as an
argument that it returns anew. They are put there for a call, and taken out after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class StatePlaces:
    """Where the states of one layer are, in the order in which they are kept."""

    attributes: tuple[tuple[str, str], ...] = ()
    """Paths of modules inside the layer, and names of their attributes, which are None before the
    first token.
    """
    argument: int | str | None = None
    """The place of the argument that has all of them; before the first token the model makes it."""
    number: int = 0
    """Of what the layer returns, the number of that."""

    def __bool__(self) -> bool:
        return bool(self.attributes) or self.argument is not None

    def put(self, layer: nn.Module, states: Sequence[Tensor]) -> None:
        """Let the modules of `layer` have `states`; none: be as before the first token."""
        for i, (path, name) in enumerate(self.attributes):
            setattr(layer.get_submodule(path), name, states[i] if states else None)

    def taken(self, layer: nn.Module, given: Any, output: Any) -> list[Tensor]:
        """The states that a call has left, where the argument was `given`: in the dtypes of that,
        as the model keeps them.
        """
        if self.argument is not None:
            pairs = zip(output[self.number], given, strict=True)
            return [state.to(like.dtype) for state, like in pairs]
        return [getattr(layer.get_submodule(path), name) for path, name in self.attributes]


@dataclass(slots=True)
class Apart:
    """The states of one layer beside the cache: those before its call, then those after it."""

    states: list[Tensor] = field(default_factory=list)


def attributes_of(layer: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor | None]]:
    """Attributes of the modules of a layer that are tensors, or could become some."""
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if value is None or isinstance(value, Tensor):
                yield (path, name), value


def states_in(given: Any, output: Any) -> int:
    """Which of the values that a layer returns is what it was `given`, as several tensors of the
    same shapes; 0: none.
    """
    if not isinstance(given, (tuple, list)) or isinstance(output, Tensor):
        return 0
    for number, value in enumerate(output):
        if number and isinstance(value, (tuple, list)) and len(value) == len(given):
            pairs = list(zip(value, given, strict=True))
            if pairs and all(
                isinstance(one, Tensor) and isinstance(like, Tensor) and one.shape == like.shape
                for one, like in pairs
            ):
                return number
    return 0
