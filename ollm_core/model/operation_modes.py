"""What a model's forward is run in to be followed without data: questions about data answered, and
dependences between tensors noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ollm_core.memory.tracker import OperationMode, made_at_once, tensors_in


class AllAreTrue(OperationMode):
    """Answers questions about data that is not there: what is asked is true, all of what is chosen
    from is chosen, and numbers are 1.
    """

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1
        if func is aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is aten.index.Tensor and args[0].is_meta:
            args = args[0], [part for one in args[1] for part in _as_numbers(one)]
        result = made_at_once(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result


def _as_numbers(index: Tensor | None) -> Sequence[Tensor | None]:
    """The indices that a mask of an indexing stands for, where all of it is true."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return (index,)
    return index.new_empty(index.dim(), index.numel(), dtype=torch.int64).unbind()


class Marks(OperationMode):
    """Follows which tensors depend on marked ones."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # an id is one tensor's for as long as that lives

    def add(self, value: Tensor, mark: str) -> None:
        """From here on `value` has this mark alone."""
        self._alive.append(value)
        self._found[id(value)] = frozenset((mark,))

    def _join(self, value: Tensor, marks: frozenset[str]) -> None:
        self._alive.append(value)
        self._found[id(value)] = self.of(value) | marks

    def of(self, value: Tensor) -> frozenset[str]:
        """The marks of a tensor."""
        return self._found.get(id(value), frozenset())

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        marks = frozenset().union(*(self.of(one) for one in tensors_in(args, kwargs)))
        if marks:
            for one in tensors_in(result):
                self._join(one, marks)
                if one._base is not None and any(one is arg for arg in args):
                    self._join(one._base, marks)  # written into a part of it
        return result
