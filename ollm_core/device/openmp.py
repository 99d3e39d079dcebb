"""Lets go of the threads that a thread has for computing with, so that another has the cores."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_LIBRARY = re.compile(r"(/\S*/libgomp[^/\s]*)$", re.MULTILINE)
_SOFT = 1
"""`omp_pause_soft` of the OpenMP specification, 5.0 and later: settings stay."""


def release_openmp_threads() -> None:
    """End the OpenMP threads that the calling thread has started; its next product starts others.

    Each thread that computes keeps a team of its own. GNU's library counts them all, and lets none
    spin for its next work once they are more than the processors: where one thread opened the model
    and another computes, each of hundreds of products in a pass waits for threads to wake up.
    Does nothing where another library computes, or the system does not say which.
    """
    try:
        maps = _MAPS.read_text()
    except OSError:
        return
    for path in {*_LIBRARY.findall(maps)}:
        pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
        if pause is not None:
            pause(_SOFT)


@contextmanager
def openmp_threads_end() -> Iterator[None]:
    """After the `with` block, or a function so decorated, the calling thread has none left."""
    try:
        yield
    finally:
        release_openmp_threads()
