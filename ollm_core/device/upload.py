"""Copies data to a device while it computes, through a few device buffers that are used in turn."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from ollm_core.device.buffers import ALIGNMENT, round_up
from ollm_core.device.transfer import Bus, Event


@dataclass(eq=False, slots=True)
class Sent:
    """A device buffer, and what was sent to it."""

    buffer: Tensor
    free: Event
    """The device has done with what was there before."""
    content: Tensor
    """The bytes that were sent. Right only for what comes after `Upload.receive`."""
    copied: Event
    """The device has them; where they came from may be used again."""
    times: tuple[Event, Event] | None = None
    """Around the copy."""


@dataclass(slots=True)
class UploadCounters:
    """What went to the device. Times are the device's own, where they are measured."""

    num_bytes: int = 0
    copy_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Of those, compute had nothing else to do."""

    def add(self, other: UploadCounters) -> None:
        """Count what another counted too."""
        self.num_bytes += other.num_bytes
        self.copy_seconds += other.copy_seconds
        self.waited_seconds += other.waited_seconds


class Upload:
    """Copies host memory to device buffers, in a stream of its own. The host waits for nothing:
    compute waits for a copy where it receives it, and a copy for the compute that uses what its
    buffer holds.
    """

    def __init__(
        self, bus: Bus, num_bytes: int, num_buffers: int = 1, *, timed: bool = False
    ) -> None:
        """`num_bytes` is the most that is sent at once. The buffers are allocated with the first
        of it.
        """
        self.num_bytes = num_bytes
        self._bus = bus
        self.num_buffers = num_buffers
        self._timed = timed
        self._vacant: deque[Sent] = deque()  # that which is free first comes first
        self._num_taken = 0
        self._counters = UploadCounters()
        self._running: deque[tuple[Event, ...]] = deque()

    @property
    def has_room(self) -> bool:
        """Whether a buffer is not in use."""
        return self._num_taken < self.num_buffers

    @property
    def counters(self) -> UploadCounters:
        """So far; times are those of what has come."""
        self._add_times()
        return self._counters

    def resize(self, num_buffers: int) -> None:
        """Have so many buffers; none is in use. Waits for what is being copied."""
        if num_buffers != self.num_buffers:
            self.close()
            self.num_buffers = num_buffers

    def send(self, *parts: Tensor) -> Sent:
        """Begin to copy `parts`, bytes in host memory that stay as they are until `copied`: side by
        side, each to a multiple of ALIGNMENT. `release` gives the buffer back.
        """
        if not self.has_room:
            raise RuntimeError(f"all {self.num_buffers} upload buffers are in use")
        if not self._vacant and not self._num_taken:
            self._vacant.extend(self._new() for _ in range(self.num_buffers))
        sent = self._vacant[0]
        self._bus.copying.wait_event(sent.free)
        begin = self._bus.copied(timed=True) if self._timed else None
        end = 0
        for part in parts:
            begin_at = round_up(end, ALIGNMENT)
            end = begin_at + part.numel()
            self._bus.copy(sent.buffer[begin_at:end], part)
        sent.content = sent.buffer[:end]
        sent.copied = self._bus.copied(timed=self._timed)
        sent.times = (begin, sent.copied) if begin is not None else None
        self._counters.num_bytes += sum(part.numel() for part in parts)
        self._num_taken += 1
        return self._vacant.popleft()

    def receive(self, sent: Sent) -> Tensor:
        """The bytes on the device, for operators that are called from now on until `release`."""
        computing = self._bus.computing
        if sent.times is None:
            computing.wait_event(sent.copied)
            return sent.content
        idle = computing.record_event(self._bus.event(timed=True))
        computing.wait_event(sent.copied)
        ready = computing.record_event(self._bus.event(timed=True))
        self._running.append((*sent.times, idle, ready))
        return sent.content

    def release(self, sent: Sent) -> None:
        """Let the buffer be used again when the operators that were called so far are through."""
        sent.free = self._bus.computing.record_event()
        self._vacant.append(sent)
        self._num_taken -= 1
        self._add_times()

    def close(self) -> None:
        """Free the buffers; none is in use. Returns when no copy writes to them any more."""
        if self._vacant:
            self._bus.copied().synchronize()
            self._vacant.clear()

    def _add_times(self) -> None:
        while self._running and self._running[0][-1].query():
            begin, end, idle, ready = self._running.popleft()
            self._counters.copy_seconds += begin.elapsed_time(end) / 1e3
            self._counters.waited_seconds += idle.elapsed_time(ready) / 1e3

    def _new(self) -> Sent:
        buffer = self._bus.device_buffer(self.num_bytes)
        # Whoever had this memory before may still compute in it.
        free = self._bus.computing.record_event()
        return Sent(buffer, free, buffer[:0], free)
