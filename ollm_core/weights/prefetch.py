"""The prefetching ring: a thread reads units in pass order into a few reused buffers, ahead of the
pass.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.buffers import as_memoryview
from ollm_core.device.memory import SHARED, DeviceMemory
from ollm_core.device.transfer import Event
from ollm_core.errors import ReadError
from ollm_core.weights.units import WeightUnit


@dataclass(eq=False, slots=True)
class Slot:
    """One buffer of the ring and what is in it."""

    buffer: Tensor
    offsets: Sequence[int] = ()
    copied: Event | None = None
    """What is in it has been copied to a device: not before may it be filled again."""
    built: dict[int, list[Tensor]] = field(default_factory=dict)
    """Parameters that are views of this buffer, by unit: they are the same at every pass, so made
    once.
    """


class Ring(Closing):
    """Reads the units of `order` cyclically; the reader stops when every buffer is full."""

    def __init__(
        self,
        units: Sequence[WeightUnit],
        source: ByteSource,
        num_slots: int,
        slot_bytes: int,
        memory: DeviceMemory = SHARED,
    ) -> None:
        """`slot_bytes` must hold the largest unit; what is read is for a device with `memory`.
        The thread starts with the first `set_order`.
        """
        self.slots = [Slot(memory.host_buffer(slot_bytes)) for _ in range(num_slots)]
        self.bytes_read = 0
        self.read_seconds = 0.0
        self.waited_seconds = 0.0
        """That `take` has waited."""
        self._units = units
        self._source = source
        self._order: list[int] = []
        self._next = 0
        self._free = deque(self.slots)
        self._ready: deque[tuple[int, Slot]] = deque()
        self._error: BaseException | None = None
        self._paused = False  # after an error, until a pass is tried again
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read_ahead, name="ollm-reader", daemon=True)

    def set_order(self, order: Sequence[int]) -> None:
        """Read these units from now on, in this cyclic order. What is ready and
        comes first in it stays. Called before each pass: an error that the last one did not come to
        see is forgotten, and its unit read again.
        """
        with self._changed:
            self._error = None
            self._changed.notify_all()
            if list(order) == self._order:
                return
            self._order = list(order)
            ready, self._ready = self._ready, deque()
            for unit_idx, slot in ready:
                if len(self._ready) < len(order) and unit_idx == order[len(self._ready)]:
                    self._ready.append((unit_idx, slot))
                else:
                    self._free.append(slot)
            self._next = len(self._ready) % max(len(order), 1)
            self._changed.notify_all()
        if not self._thread.is_alive():
            self._thread.start()

    def take(self, unit_idx: int) -> Slot:
        """The slot that holds `unit_idx`, waiting for it; the caller gives it back. Raises
        ReadError.

        A pass that was broken off leaves the ring in the middle: units before the wanted one are
        passed over. After an error nothing is read until the next call.
        """
        with self._changed:
            self._paused = False
            self._changed.notify_all()
        while True:
            with self._changed:
                start = time.perf_counter()
                self._changed.wait_for(lambda: self._ready or self._error or self._closed)
                self.waited_seconds += time.perf_counter() - start
                if self._error and not self._ready:  # what was read before it is still good
                    error, self._error = self._error, None
                    self._paused = True
                    raise error
                if self._closed:
                    raise ReadError("the model was closed while a weight pass was running")
                found, slot = self._ready.popleft()
                if found == unit_idx:
                    return slot
            self.give_back(slot)

    def take_ready(self, unit_idx: int) -> Slot | None:
        """The slot that holds `unit_idx`, if that is what comes next and is there already."""
        with self._changed:
            if self._ready and self._ready[0][0] == unit_idx:
                return self._ready.popleft()[1]
        return None

    def give_back(self, slot: Slot, copied: Event | None = None) -> None:
        """Let the reader use this slot again: at once, or when it has been `copied`."""
        with self._changed:
            slot.copied = copied
            self._free.append(slot)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for slot in self.slots:  # the traceback of a failed read may hold it
            slot.buffer = slot.buffer[:0].clone()
            slot.built.clear()
        self.slots.clear()
        self._free.clear()
        self._ready.clear()

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._closed
                        or (self._free and self._order and not self._error and not self._paused)
                    )
                )
                if self._closed:
                    return
                slot, order, position = self._free.popleft(), self._order, self._next
            unit_idx = order[position]
            error = self._fill(slot, unit_idx)
            with self._changed:
                if error or order is not self._order:
                    self._free.append(slot)
                    self._error = error
                else:
                    self._ready.append((unit_idx, slot))
                    self._next = (position + 1) % len(order)
                self._changed.notify_all()

    def _fill(self, slot: Slot, unit_idx: int) -> BaseException | None:
        tensors = self._units[unit_idx].tensors
        try:
            if slot.copied is not None:
                slot.copied.synchronize()
                slot.copied = None
            start = time.perf_counter()
            slot.offsets = self._source.read(tensors, as_memoryview(slot.buffer))
        except BaseException as error:  # noqa: BLE001 - handed to the pass that waits for it
            return error
        self.read_seconds += time.perf_counter() - start
        self.bytes_read += self._source.buffer_bytes(tensors)
        return None
