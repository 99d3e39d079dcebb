"""Page-aligned buffers on huge pages, as O_DIRECT needs them for reads at the speed of the disk."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 4096
"""Bytes of a page, the unit of O_DIRECT reads."""
HUGE_PAGE = 2 << 20
ALIGNMENT = 64
"""Of a tensor in memory. On a CPU matrix libraries give other last bits in float32 for data that is
not aligned to it; on CUDA they choose their kernels by it, up to 16 bytes.
"""

Lock = Callable[[int, int], Callable[[], None] | None]
"""Locks the pages at an address, so many bytes: what is to be called before they go back to the
machine, or None if they could not be locked.
"""


class _LockedMap(mmap.mmap):
    """Memory that is unlocked before it is unmapped: a driver would take what is mapped next at
    its address for what it has locked.
    """

    unlock: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.unlock is not None and not sys.is_finalizing():
            self.unlock()


def round_up(num_bytes: int, unit: int = PAGE) -> int:
    """`num_bytes` rounded up to a multiple of `unit`."""
    return -(-num_bytes // unit) * unit


def aligned_buffer(num_bytes: int, lock: Lock | None = None, *, huge: bool = True) -> Tensor:
    """A uint8 tensor of `num_bytes`, page-aligned, on `huge` pages where the kernel gives them.
    Its whole pages are locked by `lock`.

    Reads from disk and products are quicker on huge pages. But the kernel must find and clear whole
    ones, which takes longer than a read where memory is full of cached files: for what is filled
    once, small ones come sooner.

    The memory is private and anonymous: Python's default for an anonymous map is shared memory,
    which gets no huge pages. It is mapped at once and taken from the machine as it is touched; it
    goes back when the last tensor that views it does.
    """
    size = max(round_up(num_bytes), PAGE)
    want_huge = huge and size >= HUGE_PAGE
    mapped = (mmap.mmap if lock is None else _LockedMap)(
        -1, size + (HUGE_PAGE if want_huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    start = (-address) % HUGE_PAGE if want_huge else 0
    if want_huge and hasattr(mmap, "MADV_HUGEPAGE"):
        # Whole ones only: the one that the end lies in would be taken for all its two megabytes.
        mapped.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    if lock is not None and isinstance(mapped, _LockedMap):
        mapped.unlock = lock(address + start, size)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=start)


def as_memoryview(buffer: Tensor) -> memoryview:
    """The bytes of a contiguous CPU uint8 tensor, writable, without a copy. The caller keeps the
    tensor alive.
    """
    return memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr())).cast("B")


def put_into(place: Tensor, value: Tensor) -> Tensor:
    """`value` in the memory of `place`, which is of its shape; in new memory on that device if it
    has another dtype.

    What lives through a whole prompt so stays where it is. Made anew for each layer between what
    comes and goes, it would leave gaps that the heap of the process keeps.
    """
    if value.dtype != place.dtype:
        place = torch.empty_like(value, device=place.device)
    return place.copy_(value)
