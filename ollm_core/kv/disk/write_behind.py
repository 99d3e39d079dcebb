"""Writes full blocks to disk in a thread, while the pass goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

from torch import Tensor

Slot = tuple[int, int]
"""A layer, and a block of it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Unwritten:
    tail: Tensor
    buffer: Tensor
    """The whole pages that `tail` lies in."""
    error: BaseException | None = None


class WriteBehind:
    """Full blocks on their way to the disk. One that waits, or could not be written, is served from
    memory; the error of the latter is raised by `check` until the block is forgotten.
    """

    def __init__(self, spares: Iterable[Tensor], writer: Executor) -> None:
        """`spares` are buffers to go on with: a block that waits takes one away. `writer` is one
        thread, the owner's to shut down: what waits here then may know the owner.
        """
        self._changed = threading.Condition()  # guards the three below
        self._spares: dict[int, list[Tensor]] = {}  # by their size
        self._pending: dict[Slot, _Unwritten] = {}
        self._failed: dict[Slot, _Unwritten] = {}
        self._writer = writer
        for spare in spares:
            self._spares.setdefault(len(spare), []).append(spare)

    def put(self, slot: Slot, tail: Tensor, buffer: Tensor, write: Callable[[], None]) -> Tensor:
        """Have `tail`, which lies in `buffer`, written to `slot` by a call of `write` in another
        thread. Returns a buffer of the same size to go on with; waits while there is none. Raises
        as `check`.
        """
        spares = self._spares[len(buffer)]
        with self._changed:
            self._changed.wait_for(lambda: spares or self._failed)
            self.check()
            spare = spares.pop()
            self._pending[slot] = _Unwritten(tail, buffer)
        self._writer.submit(self._write, slot, write)
        return spare

    def copy(self, slot: Slot, target: Tensor) -> bool:
        """Copy a block if it is not on disk. The lock keeps its buffer from being used again."""
        with self._changed:
            unwritten = self._failed.get(slot) or self._pending.get(slot)
            if unwritten is not None:
                target.copy_(unwritten.tail)
        return unwritten is not None

    def forget(self, slot: Slot) -> None:
        """Return when nothing will write or remember the block any more."""
        with self._changed:
            self._changed.wait_for(lambda: slot not in self._pending)
            if slot in self._failed:
                self._give_back(self._failed.pop(slot))

    def flush(self) -> None:
        """Return when the disk has every block, or has refused one: raises as `check`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)
            self.check()

    def check(self) -> None:
        """Raise what the thread met when it wrote a block."""
        with self._changed:
            for unwritten in self._failed.values():
                if unwritten.error is not None:
                    raise unwritten.error

    def clear(self) -> None:
        """Let go of all buffers, when the thread has ended."""
        self._spares.clear()
        self._pending.clear()
        self._failed.clear()

    def _write(self, slot: Slot, write: Callable[[], None]) -> None:
        failure: BaseException | None = None
        try:
            write()
        except BaseException as error:  # noqa: BLE001 - handed to the pass by `check`
            failure = error
        with self._changed:
            unwritten = self._pending.pop(slot)
            if failure:
                self._failed[slot] = _Unwritten(unwritten.tail, unwritten.buffer, failure)
            else:
                self._give_back(unwritten)
            self._changed.notify_all()

    def _give_back(self, unwritten: _Unwritten) -> None:
        self._spares[len(unwritten.buffer)].append(unwritten.buffer)
