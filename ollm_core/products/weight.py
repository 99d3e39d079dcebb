"""A weight that brings its own products to any code that multiplies with it: a layer of
transformers, experts, the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

_MATMUL = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm})
_VIEWS = frozenset({Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__, Tensor.transpose})  # type: ignore[attr-defined]


class Products(Protocol):
    """What multiplies with a weight."""

    def linear(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`states` [..., K] times `weight` [N, K] transposed, plus `bias` [N] -> [..., N]."""

    def matmul(self, states: Tensor, weight: Tensor) -> Tensor:
        """`states` [..., K] times `weight` [K, N] -> [..., N]."""


class ProductWeight(Tensor):
    """A matrix of which products run as its `products` say; all else is torch's own.

    torch hands each call of one of its functions with such a tensor to `__torch_function__`: that
    is its way of extension, and nothing of torch or transformers is replaced.
    """

    products: Products

    @classmethod
    def of(cls, matrix: Tensor, products: Products) -> ProductWeight:
        """A view of `matrix`, which holds no more memory."""
        weight = matrix.detach().as_subclass(cls)
        weight.products = products
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See torch.Tensor. Results are plain tensors, but for the transposed matrix."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is functional.linear and isinstance(args[1], cls):
                return args[1].products.linear(*args, **(kwargs or {}))
            if func in _MATMUL and isinstance(args[1], cls):
                return args[1].products.matmul(*args)
            if func is torch.addmm and not kwargs and isinstance(args[2], cls):  # GPT-2's layers
                return args[2].products.linear(args[1], args[2].t(), args[0])
            result = func(*args, **(kwargs or {}))
            if func in _VIEWS and isinstance(args[0], cls):
                return cls.of(result, args[0].products)
            return result
