"""Reads groups of experts into two buffers in turn: one is filled while the other is used.

Unlike the ring, it is told what to read only when a layer knows which experts it wants.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.buffers import as_memoryview
from ollm_core.device.memory import SHARED, DeviceMemory
from ollm_core.device.transfer import Event
from ollm_core.errors import ReadError
from ollm_core.weights.units import WeightUnit


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Some units by number, whose bytes are read together."""

    members: tuple[int, ...]
    units: tuple[WeightUnit, ...]
    num_bytes: int
    """Bytes of buffer."""

    @property
    def packed(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Each member, and where its tensors begin when all of the group's are side by side."""
        begin = 0
        for member, unit in zip(self.members, self.units, strict=True):
            yield member, [begin + place for place in unit.packed_places]
            begin += unit.packed_bytes


@dataclass(slots=True, eq=False)
class Filled:
    """A group that was read."""

    group: Group
    buffer: Tensor
    offsets: tuple[Sequence[int], ...]
    """Of each unit's tensors."""
    seconds: float
    copied: Event | None = None
    """To be set by who copies it to a device: the buffer is not filled again before."""

    @property
    def parts(self) -> list[Tensor]:
        """The bytes of all tensors, in order."""
        pairs = zip(self.group.units, self.offsets, strict=True)
        return [part for unit, offsets in pairs for part in unit.parts(self.buffer, offsets)]


class GroupReader(Closing):
    """Two buffers and the thread that fills them."""

    def __init__(self, source: ByteSource, slot_bytes: int, memory: DeviceMemory = SHARED) -> None:
        """`slot_bytes` must hold the largest group; what is read is for a device with `memory`.
        The thread starts with the first read.
        """
        self.slot_bytes = slot_bytes
        self._source = source
        self._buffers = [memory.host_buffer(slot_bytes) for _ in range(2)]
        self._last: list[Filled | None] = [None, None]  # in each buffer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ollm-experts")
        self._closed = False

    @contextmanager
    def reading(self, groups: Sequence[Group]) -> Iterator[Iterator[Filled]]:
        """Each group in order, valid until the next step; the one after it is being read meanwhile,
        the first one from now on. Raises ReadError at a step.
        """
        waiting: deque[Future[Filled]] = deque()

        def submit(i: int) -> None:
            if self._closed:
                raise ReadError("the model was closed while a weight pass was running")
            if i < len(groups):
                waiting.append(self._thread.submit(self._fill, groups[i], i % 2))

        def steps() -> Iterator[Filled]:
            for i in range(len(groups)):
                submit(i + 1)  # its buffer is that of the group before this one
                self._last[i % 2] = filled = waiting.popleft().result()
                yield filled

        submit(0)
        try:
            yield steps()
        finally:
            for future in waiting:
                future.exception()  # waits; nobody wants it any more

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown(wait=True)
        self._buffers.clear()
        self._last = [None, None]

    def _fill(self, group: Group, index: int) -> Filled:
        buffer, last = self._buffers[index], self._last[index]
        if last is not None and last.copied is not None:
            last.copied.synchronize()
        start = time.perf_counter()
        tensors = [tensor for unit in group.units for tensor in unit.tensors]
        offsets = iter(self._source.read(tensors, as_memoryview(buffer)))
        parts = tuple([next(offsets) for _ in unit.tensors] for unit in group.units)
        return Filled(group, buffer, parts, time.perf_counter() - start)


def member_bytes(unit: WeightUnit, source: ByteSource) -> int:
    """What a unit takes of a buffer for groups, as read or packed."""
    return max(source.buffer_bytes(unit.tensors), unit.packed_bytes)


def cut_groups(
    members: Sequence[int], units: Sequence[WeightUnit], source: ByteSource, slot_bytes: int
) -> Iterator[Group]:
    """Cut `members`, numbers in `units`, into groups that fit into `slot_bytes`, both as read and
    packed, in their order.

    Bytes of neighbours are read at once, so a group may take less than its members, or a little
    more.
    """
    sizes = {i: member_bytes(units[i], source) for i in members}
    left = list(members)
    while left:
        count, total = 0, 0
        while count < len(left) and total + sizes[left[count]] <= slot_bytes:
            total += sizes[left[count]]
            count += 1
        assert count, "a buffer holds the largest unit"
        group = _group(left[:count], units, source)
        while group.num_bytes > slot_bytes:
            group = _group(group.members[:-1], units, source)
        yield group
        del left[: len(group.members)]


def _group(members: Sequence[int], units: Sequence[WeightUnit], source: ByteSource) -> Group:
    found = tuple(units[i] for i in members)
    num_bytes = source.buffer_bytes([tensor for unit in found for tensor in unit.tensors])
    return Group(tuple(members), found, num_bytes)
