"""Budgets and accounting: who holds how many bytes of one memory, the most that ever was, and a
limit that holds.
"""

from __future__ import annotations

import numbers
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal

from ollm_core.errors import DoesNotFitError, InputError
from ollm_core.options import Size, whole_number

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(size: Size) -> int:
    """Bytes from `8GB` (10**9), `512MiB` (2**20) or a whole number of bytes, also as 2e9.

    Raises InputError for a string without a unit, an unknown unit, what is no whole number, or a
    size below one byte.
    """
    num_bytes: int | None
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = match[2].upper() if match else ""
        known = match is not None and unit and unit in _UNITS
        num_bytes = int(Decimal(match[1]) * _UNITS[unit]) if match and known else None
    else:
        is_float = isinstance(size, numbers.Real) and not isinstance(size, numbers.Integral)
        num_bytes = int(size) if is_float and float(size).is_integer() else whole_number(size)
    if num_bytes is None or num_bytes < 1:
        few = num_bytes is not None
        hint = "it must be at least one byte" if few else "write it with a unit"
        raise InputError(f"{size!r} is not a memory size", hint=f"{hint}, as in 8GB or 512MiB")
    return num_bytes


def format_size(num_bytes: float) -> str:
    """`num_bytes` in decimal units with three digits, as in `269 MB` or `1.46 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return (
                f"{num_bytes / size:.3g} {unit}"
                if num_bytes < 999.5 * size
                else f"{num_bytes / size:.0f} {unit}"
            )
    return f"{num_bytes:.0f} B"


class MemoryAccount:
    """Bytes held of one memory, by kind, under a limit.

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
                    f"{kind} needs {format_size(num_bytes)} of {self.name}, "
                    f"{free} of {limit} is free",
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
