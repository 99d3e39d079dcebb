"""Counts what torch allocates, operation by operation: exact, and only for plans and tests, as it
is slow.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_ELEMENTWISE = frozenset(
    {
        _ATEN.add.Tensor,
        _ATEN.clamp.default,
        _ATEN.cos.default,
        _ATEN.div.Tensor,
        _ATEN.exp.default,
        _ATEN.logaddexp.default,
        _ATEN.mul.Tensor,
        _ATEN.neg.default,
        _ATEN.pow.Tensor_Scalar,
        _ATEN.rsqrt.default,
        _ATEN.sigmoid.default,
        _ATEN.silu.default,
        _ATEN.sin.default,
        _ATEN.softplus.default,
        _ATEN.sub.Tensor,
    }
)
"""Those that take most of a trace: torch's own meta functions need 0.1 to 3 ms for each."""
_SHAPED_AS: Mapping[Any, Any] = {
    _ATEN.clamp.default: _ATEN.neg.default,
    _ATEN.logaddexp.default: _ATEN.add.Tensor,
    _ATEN.softplus.default: _ATEN.neg.default,
}
"""For those that take longest: others of the same tensors, which give the same without data."""
_IN_PLACE = frozenset(
    {_ATEN.addcmul_.default, _ATEN.exp_.default, _ATEN.tril_.default, _ATEN.triu_.default}
)
"""Those that give their first argument and allocate nothing."""
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class OperationMode(TorchDispatchMode):
    """Sees every operation of torch inside the `with` block, and answers in its place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.seen(func, args, kwargs or {})

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `func` with these arguments."""
        raise NotImplementedError


class AllocationTracker(OperationMode):
    """Bytes of live tensor storages of one device type that were made inside the `with` block.

    Kernels' inner scratch memory is not seen. `limit` makes it an enforcer: going past it raises
    MemoryError.
    """

    def __init__(self, device_type: str, limit: int | None = None) -> None:
        super().__init__()
        self.used = 0
        self.peak = 0
        self._device_type = device_type
        self._limit = limit
        self._known: set[int] = set()

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_inference_mode_enabled() and _is_composite(func):
            with self:  # its parts come here; outside of inference mode they do by themselves
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        for tensor in tensors_in(args, *kwargs.values()):
            self._count(tensor.untyped_storage(), made_here=False)
        result = self._call(func, args, kwargs)
        for tensor in tensors_in(result):
            if tensor.device.type == self._device_type:
                self._count(tensor.untyped_storage())
        return result

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _count(self, storage: torch.UntypedStorage, *, made_here: bool = True) -> None:
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = storage.nbytes() if made_here else 0
        self._known.add(key)
        self.used += num_bytes
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._forget, key, num_bytes)
        if self._limit is not None and self.used > self._limit:
            raise MemoryError(f"{self.used} bytes allocated, the limit is {self._limit}")

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.used -= num_bytes


class _MetaTracker(AllocationTracker):
    """Follows work on the meta device. What depends on data, as a router's choice does, is answered
    there: every token goes to every expert, which is the most that one expert can get.
    """

    def __init__(self) -> None:
        super().__init__("meta")

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (result := made_at_once(func, args, kwargs)) is not None:
            return result
        if args and isinstance(args[0], Tensor) and args[0].device.type == "meta":
            if func is _ATEN.addmm.default:  # a layer's products with a bias
                _, left, right = args
                return torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device="meta")
            if func in _IN_PLACE:
                return args[0]
            if func is _ATEN.nonzero.default:  # a token chooses an expert once
                shape = args[0].shape
                return torch.empty(max(shape), len(shape), dtype=torch.int64, device="meta")
            if func is _ATEN._local_scalar_dense.default:
                return 0
        return func(*args, **kwargs)


def made_at_once(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What an operation gives on the meta device, of those that torch's own code takes longest for
    there; None if it is none of them, or not plain.
    """
    if func in _ELEMENTWISE:
        result = elementwise(args)
        if result is None and func in _SHAPED_AS and _are_floats(shown := tensors_in(args)):
            return cast("Tensor", _SHAPED_AS[func](*shown))
        return result
    if func is _ATEN.mean.dim and not kwargs:
        return mean(*args)
    return concatenated(*args) if func is _ATEN.cat.default else None


def elementwise(args: Sequence[Any]) -> Tensor | None:
    """What an elementwise operation on floating-point numbers gives on the meta device; None if
    that is not plain: all tensors have one dtype and no gaps, and so has the result.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if any(isinstance(arg, complex) for arg in args):
        return None
    if not _are_plain(tensors):
        return None
    shape = tensors[0].shape
    if len(tensors) > 1:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return torch.empty(shape, dtype=tensors[0].dtype, device="meta")


def mean(value: Tensor, dims: Sequence[int] | None, keepdim: bool = False) -> Tensor | None:
    """The same of a mean over `dims`."""
    if not dims or not _are_plain([value]):
        return None
    over = {dim % value.dim() for dim in dims}
    kept = ((1 if i in over else n) for i, n in enumerate(value.shape) if keepdim or i not in over)
    return torch.empty(tuple(kept), dtype=value.dtype, device="meta")


def concatenated(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """The same of tensors of as many dimensions, one after another."""
    first = tensors[0]
    if not _are_plain(tensors) or any(one.dim() != first.dim() for one in tensors):
        return None
    shape = list(first.shape)
    shape[dim] = sum(one.shape[dim] for one in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether they have no data, no gaps, and one dtype, of floating-point numbers."""
    return _are_floats(tensors) and all(one.is_contiguous() for one in tensors)


def _are_floats(tensors: Sequence[Tensor]) -> bool:
    dtype = tensors[0].dtype
    return dtype.is_floating_point and all(one.dtype == dtype and one.is_meta for one in tensors)


def traced_peak(work: Callable[[], object]) -> int:
    """Peak bytes that `work` allocates on the meta device, its result included."""
    with torch.no_grad(), _MetaTracker() as tracker:
        result = work()
        del result
    peak: int = tracker.peak
    return peak


class _OperationLog(OperationMode):
    """Writes down operations, what they are called with, and which parameters they take."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._names = names

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.lines.append(f"{func}{self._told(args)}{self._told(kwargs)}")
        if func in _ELEMENTWISE and (result := elementwise(args)) is not None:
            return result
        return func(*args, **kwargs)

    def _told(self, value: object) -> str:
        if isinstance(value, Tensor):
            name = self._names.get(value.untyped_storage()._cdata, "")
            return f"{name}{list(value.shape)}"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self._told, value))})"
        if isinstance(value, dict):
            return "".join(f" {key}={self._told(one)}" for key, one in value.items())
        return str(value)


def called_operations(work: Callable[[], object], parameters: Mapping[str, Tensor]) -> list[str]:
    """Each operation of `work`, with its constants, the shapes of its tensors, and the names of
    those that are `parameters`.
    """
    names = {value.untyped_storage()._cdata: name for name, value in parameters.items()}
    with torch.no_grad(), _OperationLog(names) as log:
        work()
    lines: list[str] = log.lines
    return lines


class OneExpertTaken(OperationMode):
    """Lets the family's code for one expert be traced on the meta device, where its questions about
    data have no answer: the only expert there is was chosen by every token.
    """

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _ATEN.nonzero.default:
            (asked,) = args
            found = 1 if asked.dim() == 1 else asked.numel()
            return torch.empty(found, asked.dim(), dtype=torch.int64, device=asked.device)
        if func is _ATEN._local_scalar_dense.default:
            return args[0].dtype != torch.bool and 0
        result = made_at_once(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether torch makes an operation from others. Its own code for that is meant: what there is
    of it in Python, as `decompose` finds, copies where that does not.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE.name)


def tensors_in(*values: object) -> list[Tensor]:
    """Those in nested values, as the arguments or the result of an operation."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(*value)
        elif isinstance(value, Mapping):
            found += tensors_in(*value.values())
    return found
