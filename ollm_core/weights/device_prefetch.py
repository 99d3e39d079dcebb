"""Sends the next unit to a device with memory of its own while the pass uses the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from ollm_core.device.transfer import Bus
from ollm_core.device.upload import Sent, Upload, UploadCounters
from ollm_core.profiling import Span

Packed = tuple[Tensor, Sequence[int]]
"""Bytes of a unit, its tensors side by side, and where these begin."""
Arriving = tuple[Sent, Sequence[int]]
"""The same on its way to the device."""
Send = Callable[..., Sent]
"""`Upload.send`."""


class Begin(Protocol):
    """Sends a unit from where it is."""

    def __call__(self, unit_idx: int, send: Send, *, wait: bool) -> Arriving | None:
        """None if it is not there yet, unless one is to `wait`."""


class DevicePrefetch:
    """Gives out units on the device. With two buffers, the unit that comes next is copied while one
    is used; with one, while a unit is used that stays on the device.
    """

    def __init__(self, bus: Bus, num_bytes: int, begin: Begin, *, timed: bool = False) -> None:
        """`num_bytes` are those of the largest unit, packed."""
        self._bus = bus
        self._upload = Upload(bus, num_bytes, timed=timed)
        self._begin = begin
        self._ahead: tuple[int, Arriving] | None = None
        self._streamed: Sequence[int] = ()
        self._next: dict[int, int] = {}

    @property
    def counters(self) -> UploadCounters:
        """What was sent so far."""
        return self._upload.counters

    def expect(self, streamed: Sequence[int], num_buffers: int) -> None:
        """These units, in the order of passes, come this way from now on. No unit is in use."""
        if streamed != self._streamed:
            if self._ahead is not None and self._ahead[0] not in streamed:
                self._forget()
            self._streamed = streamed
            self._next = {}
        if num_buffers != self._upload.num_buffers:
            self._forget()
            self._upload.resize(num_buffers)

    @contextmanager
    def arrived(self, unit_idx: int, span: Span) -> Iterator[Packed]:
        """A unit's bytes on the device, for operators that are called inside the context. Raises
        ReadError.
        """
        with span("wait for weights", unit_idx=unit_idx):
            if self._ahead is None or self._ahead[0] != unit_idx:
                self._forget()
                arriving = self._begin(unit_idx, self._upload.send, wait=True)
                assert arriving is not None, "it was waited for"
            else:
                arriving, self._ahead = self._ahead[1], None
            sent, offsets = arriving
        try:
            content = self._upload.receive(sent)
            self.look_ahead(unit_idx)
            yield content, offsets
        finally:
            self._upload.release(sent)

    def look_ahead(self, unit_idx: int) -> None:
        """Send what comes after a unit, if a buffer is free for it and it has been read. Where the
        copy would keep the host busy, this unit is computed first.
        """
        if self._ahead is None and self._upload.has_room and self._streamed and self._bus.locks:
            following = self._following(unit_idx)
            arriving = self._begin(following, self._upload.send, wait=False)
            self._ahead = arriving and (following, arriving)

    def close(self) -> None:
        """Free the buffers."""
        self._forget()
        self._upload.close()

    def _following(self, unit_idx: int) -> int:
        """The next unit that comes this way; after the last one the first of the next pass."""
        if unit_idx not in self._next:
            later = (i for i in self._streamed if i > unit_idx)
            self._next[unit_idx] = next(later, self._streamed[0])
        return self._next[unit_idx]

    def _forget(self) -> None:
        """What was sent ahead is not wanted."""
        if self._ahead is not None:
            self._upload.release(self._ahead[1][0])
            self._ahead = None
