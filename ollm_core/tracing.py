"""Counts what torch allocates, op by op: exact, and too slow for anything but plans and tests."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTracker(TorchDispatchMode):
    """Bytes of live tensor storages of one device type that were made inside the `with` block.

    Kernels' inner scratch memory is not seen. `limit` makes it an enforcer: going past it raises
    MemoryError.
    """

    def __init__(self, device_type: str, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = 0
        self.peak = 0
        self._device_type = device_type
        self._limit = limit
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), made_here=False)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device_type:
                self._count(leaf.untyped_storage())
        return result

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


class _DataDependent(TorchDispatchMode):
    """Answers on the meta device what depends on data, as a router's choice does: every token goes
    to every expert, which is the most that one expert can get.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].device.type == "meta":
            if func is torch.ops.aten.nonzero.default:  # a token chooses an expert once
                shape = args[0].shape
                return torch.empty(max(shape), len(shape), dtype=torch.int64, device="meta")
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0
        return func(*args, **(kwargs or {}))


def traced_peak(work: Callable[[], object]) -> int:
    """Peak bytes that `work` allocates on the meta device, its result included."""
    with (
        torch.no_grad(),
        _DataDependent(),  # type: ignore[no-untyped-call]
        AllocationTracker("meta") as tracker,
    ):
        result = work()
        del result
    peak: int = tracker.peak
    return peak


class OneExpertTaken(TorchDispatchMode):
    """Lets the family's code for one expert be traced on the meta device, where its questions about
    data have no answer: the only expert there is was chosen by every token.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.nonzero.default:
            (asked,) = args
            found = 1 if asked.dim() == 1 else asked.numel()
            return torch.empty(found, asked.dim(), dtype=torch.int64, device=asked.device)
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype != torch.bool and 0
        return func(*args, **(kwargs or {}))
