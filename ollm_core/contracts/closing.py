"""Closing: objects that own resources, and free them once, in the right thread."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType


class Closing(ABC):
    """A context manager that closes on exit. `close` may be called twice."""

    @abstractmethod
    def close(self) -> None:
        """Free everything this object owns."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_OWN_THREADS = "ollm-"
"""What the names of this library's threads begin with."""


def in_own_thread() -> bool:
    """Whether this is a thread of the library, in which nothing may wait for its threads. The
    garbage collector may run in it.
    """
    return threading.current_thread().name.startswith(_OWN_THREADS)


def close_outside(close: Callable[[], None]) -> None:
    """Call `close`, which waits for threads of the library, in another thread if this is one."""
    if in_own_thread():
        threading.Thread(target=close).start()
    else:
        close()


class Belongings(Closing):
    """What one owner has opened. It knows nothing of the owner, and so may outlive it."""

    def __init__(self, *closers: Callable[[], None]) -> None:
        """`closers` are called in this order, after the caches are closed."""
        self.caches: list[weakref.finalize[Any, Any]] = []
        """The finalizers of KV caches."""
        self.drafter: object = None
        """Closed last, if it can be."""
        self._closers = closers

    def add(self, finalizer: weakref.finalize[Any, Any]) -> None:
        """Of one more cache."""
        self.caches[:] = [*(one for one in self.caches if one.alive), finalizer]

    def close(self) -> None:
        """All of it, even if a part fails."""
        with ExitStack() as stack:
            if isinstance(self.drafter, Closing):
                stack.callback(self.drafter.close)
            closers: list[Callable[[], object]] = [*self.caches, *self._closers]
            for close in reversed(closers):
                stack.callback(close)
            self.caches.clear()
