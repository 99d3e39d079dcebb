"""Reads that give less than was asked for, as those of network file systems do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ollm_core.testing import PAGE


@contextmanager
def short_reads() -> Iterator[list[int]]:
    """In the `with` block `os.preadv`, `os.readv`, `os.pread` and `os.read` give half of what is
    asked for, in whole pages, one at least. Gives the sizes of those that were cut.
    """
    cut: list[int] = []

    def fewer(size: int) -> int:
        half = max(size // 2 // PAGE * PAGE, PAGE)
        if half < size:
            cut.append(size)
        return min(half, size)

    def vectored(real: Callable[..., int]) -> Callable[..., int]:
        def read(file: int, buffers: Sequence[Any], *others: int) -> int:
            views = [memoryview(one).cast("B") for one in buffers]
            left, kept = fewer(sum(map(len, views))), []
            for view in views:
                kept.append(view[:left])
                left -= len(kept[-1])
            return real(file, [one for one in kept if len(one)] or kept[:1], *others)

        return read

    def plain(real: Callable[..., bytes]) -> Callable[..., bytes]:
        return lambda file, size, *others: real(file, fewer(size), *others)

    with (
        patch.object(os, "preadv", vectored(os.preadv)),
        patch.object(os, "readv", vectored(os.readv)),
        patch.object(os, "pread", plain(os.pread)),
        patch.object(os, "read", plain(os.read)),
    ):
        yield cut
