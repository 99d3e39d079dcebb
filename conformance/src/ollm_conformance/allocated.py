"""What is really allocated on a CPU, whatever the accounts say: tensors that are alive, and those
that come and go. What the process has beside them is in `process_memory`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from ollm_core.device.offload import host_like
from ollm_core.memory.tracker import AllocationTracker

_STORES = "ollm_core.kv."
_DEPTH = 12  # frames between an allocation and what asked for it


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Inside the `with` block `gc.collect` and `live_bytes` look only at what was made there: there
    are some 400,000 objects before it.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python knows of, each storage once."""
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class TierTracker(AllocationTracker):
    """Counts what is allocated inside the `with` block: of the device, and apart from it of the
    host, which on a CPU differ only in what the memory is for.

    `used` and `peak` are the device's, `host_used` and `host_peak` the host's: that is what KV
    stores allocate, if KV is not on the device, and what is parked there. What is not made by a
    torch operation, as pages for O_DIRECT, is not seen: `live_bytes` sees it.
    """

    def __init__(self, *, kv_on_device: bool) -> None:
        super().__init__("cpu")
        self.host_used = 0
        self.host_peak = 0
        self._kv_on_device = kv_on_device
        self._on_host: set[int] = set()

    def _count(self, storage: torch.UntypedStorage, *, made_here: bool = True) -> None:
        peak, used = self.peak, self.used
        super()._count(storage, made_here=made_here)
        if self.used > used and self._is_for_host():
            self._on_host.add(storage._cdata)
            self.host_used += self.used - used
            self.host_peak = max(self.host_peak, self.host_used)
            self.peak, self.used = peak, used

    def _forget(self, key: int, num_bytes: int) -> None:
        super()._forget(key, num_bytes)
        if key in self._on_host:
            self._on_host.remove(key)
            self.host_used -= num_bytes
            self.used += num_bytes

    def _is_for_host(self) -> bool:
        """Who asked for the allocation that is being counted."""
        frame: FrameType | None = sys._getframe(2)
        for _ in range(_DEPTH):
            if frame is None:
                return False
            if frame.f_code is host_like.__code__:
                return True
            if str(frame.f_globals.get("__name__", "")).startswith(_STORES):
                return not self._kv_on_device
            frame = frame.f_back
        return False
