"""Memory accounts: how many bytes are held, by kind, the peak, and a limit that holds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ollm_core.errors import DoesNotFitError
from ollm_core.memory.kinds import label_of
from ollm_core.memory.pair import PerMemory
from ollm_core.memory.sizes import format_size


class MemoryAccount:
    """Bytes held of one memory, by kind (a MemoryKind, or a plugin's own), under a limit.

    Everything the library allocates there is reserved first, so that what does not fit fails before
    it is allocated. Thread-safe: the reader thread and the pass share an account.
    """

    def __init__(self, name: str, limit: int) -> None:
        """`name` is for messages, for instance "device memory"; `limit` is bytes."""
        self.name = name
        self.limit = limit
        self.used = 0
        self.peak = 0
        self.kinds: dict[str, int] = {}
        self._lock = threading.RLock()  # a finalizer may release inside `reserve`

    @property
    def free(self) -> int:
        """Bytes that can still be reserved."""
        return self.limit - self.used

    def reserve(self, kind: str, num_bytes: int) -> None:
        """Take `num_bytes`. Raises DoesNotFitError, with nothing taken, if the limit does not allow
        it.
        """
        with self._lock:
            if self.used + num_bytes > self.limit:
                free, limit = format_size(self.limit - self.used), format_size(self.limit)
                raise DoesNotFitError(
                    f"{self.name}: need {format_size(num_bytes)} for {label_of(kind)}, {free} free "
                    f"(limit {limit})",
                    hint=f"allow at least {self.used + num_bytes} bytes",
                    memory=self.name,
                    needed_bytes=self.used + num_bytes,
                )
            self.used += num_bytes
            self.kinds[kind] = self.kinds.get(kind, 0) + num_bytes
            self.peak = max(self.peak, self.used)

    def release(self, kind: str, num_bytes: int) -> None:
        """Give back what `reserve` took."""
        with self._lock:
            self.used -= num_bytes
            self.kinds[kind] = self.kinds.get(kind, 0) - num_bytes

    @contextmanager
    def holding(self, kind: str, num_bytes: int) -> Iterator[None]:
        """Reserve for the length of a `with` block."""
        self.reserve(kind, num_bytes)
        try:
            yield
        finally:
            self.release(kind, num_bytes)


Accounts = PerMemory[MemoryAccount]
"""The two memories of a model."""


def open_accounts(limits: PerMemory[int]) -> Accounts:
    """Accounts in which nothing is held yet."""
    return PerMemory(
        MemoryAccount("device memory", limits.device), MemoryAccount("host memory", limits.host)
    )
