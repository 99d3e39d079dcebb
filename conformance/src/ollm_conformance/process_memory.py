"""What the process really holds in memory, whatever any account says: tensors, numpy arrays, bytes,
maps and what libraries take for themselves.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from ollm_conformance.allocated import only_new_objects

SLACK = 8 << 20
"""Bytes that come and go with whatever else the process does: checks of what is held use much more
than this.
"""

ATTEMPTS = 3
"""How often more than expected is seen before it counts."""

_HELD = ("RssAnon:", "RssShmem:", "VmSwap:")  # pages of files are the kernel's
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"
_MMAP_THRESHOLD = -3  # of mallopt
_LARGE = 1 << 18
_SET_THP_DISABLE = 41  # of prctl


Measure = TypeVar("Measure", bound=Callable[..., None])


class MoreThanExpected(AssertionError):
    """The process holds more than it should."""


def every_time(measure: Measure) -> Measure:
    """A check that fails if each of ATTEMPTS runs of it sees more than expected.

    What is kept in no account is kept by every run. What a long process needs anew in a heap that
    others have left full of holes, or a library for its first call, is needed once.
    """

    @wraps(measure)
    def run(*args: Any, **kwargs: Any) -> None:
        for _ in range(ATTEMPTS - 1):
            try:
                return measure(*args, **kwargs)
            except MoreThanExpected:
                continue
        return measure(*args, **kwargs)

    return cast(Measure, run)


class ProcessMemory:
    """Bytes that the process holds beyond what it held when this was made."""

    def __init__(self) -> None:
        self._start = _held()

    def grown(self) -> int:
        """Since then, without what is garbage."""
        return _held() - self._start

    def expect(self, most: int, what: str, reserved: str) -> None:
        """Raises MoreThanExpected if it has grown by more than `most` and SLACK. `reserved` says in
        words what `most` is.
        """
        if resident_bytes() - self._start > most + SLACK:  # garbage and what is free included
            expect(self.grown(), most, what, reserved)


@contextmanager
def process_memory() -> Iterator[ProcessMemory]:
    """Measure inside the `with` block. What is there already is left out of garbage collection, so
    that measuring is quick.
    """
    gc.collect()
    with only_new_objects(), _small_pages():
        yield ProcessMemory()


@contextmanager
def _small_pages() -> Iterator[None]:
    """No huge pages: an object of a few bytes would take two megabytes where numpy once had an
    array, for whose addresses it asked for them.
    """
    if not hasattr(_LIBC, "prctl"):
        yield
        return
    _LIBC.prctl(_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        _LIBC.prctl(_SET_THP_DISABLE, 0, 0, 0, 0)


def peak_grown(work: Callable[[], object]) -> int | None:
    """The most that the process held during `work` beyond what it held before it. None where the
    system does not let a process ask.
    """
    before = _held()
    try:
        _CLEAR.write_text(_CLEAR_PEAK)
    except OSError:
        return None
    start = _status("VmHWM:")
    work()
    return max(_status("VmHWM:") - start, _held() - before)


def expect(grown: int, most: int, what: str, reserved: str) -> None:
    """Raises MoreThanExpected if `grown` bytes are more than `most` and SLACK."""
    if grown > most + SLACK:
        raise MoreThanExpected(
            f"{what}: expected at most {most} bytes of the process, {reserved}, and {SLACK} for "
            f"the rest, got {grown}"
        )


def process_bytes() -> int:
    """Bytes that the process has in memory, files not counted, whoever allocated them. Those that
    are free are given back first. 0 where the system does not tell.

    From the first call on large blocks are maps of their own, which go when they are freed: glibc
    raises that limit to 32 MiB as a process frees blocks, and what threads free below it stays.
    """
    if hasattr(_LIBC, "malloc_trim"):  # glibc has both
        _LIBC.mallopt(_MMAP_THRESHOLD, _LARGE)
        _LIBC.malloc_trim(0)
    return resident_bytes()


def resident_bytes() -> int:
    """As `process_bytes`, with what is free and not given back: never less, and quick, where the
    other takes up to 0.1 s in a process whose heap is large and full of holes.
    """
    return sum(map(_status, _HELD))


def _held() -> int:
    gc.collect()
    return process_bytes()


def _status(field: str) -> int:
    if not _STATUS.is_file():
        return 0
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)


_LIBC = ctypes.CDLL(None)
