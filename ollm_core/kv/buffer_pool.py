"""A store's share of a memory account, and a pool of buffers for its iterators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from ollm_core.memory.accounts import MemoryAccount

T = TypeVar("T")


class Charges:
    """One store's part of a memory account, so that closing it gives back exactly that."""

    def __init__(self, account: MemoryAccount) -> None:
        self.account = account
        self.charged: Counter[str] = Counter()
        """Bytes by kind."""
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all kinds."""
        return self.charged.total()

    def take(self, kind: str, num_bytes: int) -> None:
        """Raises DoesNotFitError, with nothing taken, if the account does not allow it."""
        self.account.reserve(kind, num_bytes)
        self.charged[kind] += num_bytes

    def give(self, kind: str, num_bytes: int) -> None:
        """Give back what `take` took. Ignored after `close`, which gave back everything."""
        if not self._closed:
            self.account.release(kind, num_bytes)
            self.charged[kind] -= num_bytes

    def close(self) -> None:
        """Give back everything. May be called twice."""
        for kind, num_bytes in self.charged.items():
            self.account.release(kind, num_bytes)
        self.charged.clear()
        self._closed = True


class BufferPool(Generic[T]):
    """A set of buffers for each iterator that is alive: the first set is kept for the next
    iterator, any other is freed.
    """

    def __init__(
        self, make: Callable[[], T], num_bytes: int, kind: str, charges: Charges | None
    ) -> None:
        """`make` allocates one set of `num_bytes`. Makes the first set: raises DoesNotFitError."""
        self._make = make
        self._num_bytes = num_bytes
        self._kind = kind
        self._charges = charges
        self._kept: list[T] = [self._new()]

    @contextmanager
    def lane(self) -> Iterator[T]:
        """A set that nobody else uses inside the context. Raises DoesNotFitError."""
        buffers = self._kept.pop() if self._kept else self._new()
        try:
            yield buffers
        finally:
            if self._kept:
                self._give()
            else:
                self._kept.append(buffers)

    def close(self) -> None:
        """Free the set that is kept. What it was charged for is the owner's to give back."""
        self._kept.clear()

    def _new(self) -> T:
        if self._charges:
            self._charges.take(self._kind, self._num_bytes)
        try:
            return self._make()
        except BaseException:
            self._give()
            raise

    def _give(self) -> None:
        if self._charges:
            self._charges.give(self._kind, self._num_bytes)
