"""Host-to-device transfers: two streams, the events that order them, and pinned host memory.
`device.memory` says which devices have them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ollm_core.device.buffers import aligned_buffer
from ollm_core.memory.sizes import format_size

logger = logging.getLogger("ollm")

_PART = 32 << 20  # of one copy, that those of another stream come in between
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of the process


class Event(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def synchronize(self) -> None:
        """Return when the device has come to it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to there, if both are timers."""


class Stream(Protocol):
    """What a device does in order."""

    def wait_event(self, event: Any) -> None:
        """What comes after this waits for an event, which was recorded before. The host does
        not.
        """

    def record_event(self, event: Any = None) -> Event:
        """Mark this place, with a new event or a given one."""


class Bus(ABC):
    """What is asked of a device with memory of its own. Nothing is done before it is asked: a plan
    has the bus of a device that is not here.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._told = False

    @abstractmethod
    def beside(self) -> Bus:
        """Another bus of the device: its copies do not wait behind those of this one."""

    @property
    @abstractmethod
    def copying(self) -> Stream:
        """The stream that copies to the device."""

    @property
    @abstractmethod
    def computing(self) -> Stream:
        """The stream that the caller's operators run on."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy the bytes `source`, in host memory, to `target` on the device, in the stream that
        copies.
        """

    @abstractmethod
    def event(self, *, timed: bool = False) -> Event:
        """An event to be recorded, for which the host can wait without being busy; a timer if it is
        `timed`.
        """

    @abstractmethod
    def device_buffer(self, num_bytes: int) -> Tensor:
        """Bytes on the device, free for use where the stream that computes is now."""

    @abstractmethod
    def lock(self, address: int, num_bytes: int) -> str | None:
        """Page-lock host memory, that copies from it run beside the host. Returns why that is
        refused, or None.
        """

    @abstractmethod
    def unlock(self, address: int) -> None:
        """Undo `lock`. No copy reads from there any more."""

    @property
    def locks(self) -> bool:
        """Whether memory could be locked so far. Other copies keep the host busy."""
        return not self._told

    def copied(self, *, timed: bool = False) -> Event:
        """All copies that were asked for so far have ended."""
        return self.copying.record_event(self.event(timed=timed))

    def host_buffer(self, num_bytes: int) -> Tensor:
        """See `aligned_buffer`; locked where that is allowed. It may be dropped at any time: it is
        unlocked when no copy reads from it any more, and then goes back to the machine.
        """
        return aligned_buffer(num_bytes, self._lock)

    def _lock(self, address: int, num_bytes: int) -> Callable[[], None] | None:
        refused = self.lock(address, num_bytes)
        if refused is None:
            return partial(self._unlock, address)
        if not self._told:
            self._told = True
            logger.warning(
                "%s of host memory cannot be pinned for %s, copies take longer: %s",
                format_size(num_bytes),
                self.device,
                refused,
            )
        return None

    def _unlock(self, address: int) -> None:
        self.copied().synchronize()
        self.unlock(address)


class CudaBus(Bus):
    """That of a CUDA device."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        """`cuda` is what is asked: `torch.cuda`."""
        super().__init__(device)
        self._cuda = cuda
        self._stream: Stream | None = None
        self._making = threading.Lock()

    def beside(self) -> Bus:
        return CudaBus(self.device, self._cuda)

    @property
    def copying(self) -> Stream:
        with self._making:
            if self._stream is None:
                self._stream = self._cuda.Stream(self.device)
            return self._stream

    @property
    def computing(self) -> Stream:
        current: Stream = self._cuda.current_stream(self.device)
        return current

    def copy(self, target: Tensor, source: Tensor) -> None:
        with self._cuda.stream(self.copying):
            for part, its in zip(target.split(_PART), source.split(_PART), strict=True):
                part.copy_(its, non_blocking=True)

    def event(self, *, timed: bool = False) -> Event:
        made: Event = self._cuda.Event(enable_timing=timed, blocking=True)
        return made

    def device_buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def lock(self, address: int, num_bytes: int) -> str | None:
        with self._cuda.device(self.device):
            cudart = self._cuda.cudart()
            error = cudart.cudaHostRegister(address, num_bytes, _PORTABLE)
            if error == cudart.cudaError.success:
                return None
            # CUDA remembers the error and gives it to the next kernel that starts.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.device)
            return str(cudart.cudaGetErrorString(error))

    def unlock(self, address: int) -> None:
        with self._cuda.device(self.device):
            self._cuda.cudart().cudaHostUnregister(address)
