"""What is really allocated on a CPU, whatever the accounts say: tensors that are alive, and those
that come and go.
"""

from __future__ import annotations

import gc
import sys
from types import FrameType

import torch

from ollm_core.tracing import AllocationTracker

_KV = "ollm_core.kv."
_DEPTH = 12  # frames between an allocation and the store that asked for it


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python knows of, each storage once."""
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class StoreTracker(AllocationTracker):
    """Counts what is allocated inside the `with` block, that of KV stores apart from the rest.

    `used` and `peak` are of the rest, `kv_used` and `kv_peak` of the stores. What is not made by a
    torch operation, as pages for O_DIRECT, is not seen: `live_bytes` sees it.
    """

    def __init__(self, *, apart: bool) -> None:
        """Without `apart` the stores count as the rest."""
        super().__init__("cpu")
        self.kv_used = 0
        self.kv_peak = 0
        self._apart = apart
        self._stored: set[int] = set()

    def _count(self, storage: torch.UntypedStorage, *, made_here: bool = True) -> None:
        peak, used = self.peak, self.used
        super()._count(storage, made_here=made_here)
        if self._apart and self.used > used and _in_a_store():
            self._stored.add(storage._cdata)
            self.kv_used += self.used - used
            self.kv_peak = max(self.kv_peak, self.kv_used)
            self.peak, self.used = peak, used

    def _forget(self, key: int, num_bytes: int) -> None:
        super()._forget(key, num_bytes)
        if key in self._stored:
            self._stored.remove(key)
            self.kv_used -= num_bytes
            self.used += num_bytes


def _in_a_store() -> bool:
    """Whether code of a KV store asked for the allocation that is being counted."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__", "")).startswith(_KV):
            return True
        frame = frame.f_back
    return False
