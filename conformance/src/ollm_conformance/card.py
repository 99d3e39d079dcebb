"""What CUDA's allocator had at its peak, told apart from what no budget counts: workspaces of
matrix libraries, and what was on the device before.
"""

from __future__ import annotations

import gc
from types import TracebackType
from typing import Self

import torch

_REQUESTED = "requested_bytes.all."


class CardPeak:
    """Context manager: the peaks of the allocator on a CUDA device, over what was held before."""

    def __init__(self, device: str | torch.device = "cuda:0") -> None:
        self._device = torch.device(device)
        self.requested_bytes = 0
        """Asked of the allocator: what accounts and plans are about."""
        self.allocated_bytes = 0
        """With each block rounded up to a multiple of 512."""
        self.reserved_bytes = 0
        """Taken of the device: with what the allocator keeps for later, and gaps."""
        self.workspace_bytes = 0
        """Of matrix libraries. What comes and goes in each product is not in `requested_bytes`, but
        in the other two; what stays is in none.
        """

    def __enter__(self) -> Self:
        gc.collect()
        kept, self._passing = make_workspaces(self._device)
        self.workspace_bytes = kept + self._passing
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._requested = _requested(self._device, "current")
        self._allocated = torch.cuda.memory_allocated(self._device)
        self._reserved = torch.cuda.memory_reserved(self._device)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.read()

    def read(self) -> None:
        """Bring the numbers up to now."""
        device = self._device
        most = _requested(device, "peak") - self._requested
        self.requested_bytes = max(most - self._passing, 0)
        self.allocated_bytes = torch.cuda.max_memory_allocated(device) - self._allocated
        self.reserved_bytes = torch.cuda.max_memory_reserved(device) - self._reserved


def make_workspaces(device: torch.device) -> tuple[int, int]:
    """Multiply, so that matrix libraries have their workspaces from now on; returns the bytes that
    they have taken here to keep, and the bytes that a product takes while it runs.
    """
    torch.cuda.init()  # without it there are no numbers
    before = _requested(device, "current")
    passing = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 128):
            square = torch.ones(128, 128, dtype=dtype, device=device)
            for bias in (None, square[0]):
                for _ in range(2):  # the first may make what is kept
                    torch.cuda.reset_peak_memory_stats(device)
                    held = _requested(device, "current")
                    made = torch.nn.functional.linear(square[:rows], square, bias)
                most = _requested(device, "peak") - held - made.nbytes
                passing = max(passing, most)
                del made
            torch.bmm(square[None], square[None])
            del square, bias
    torch.cuda.synchronize(device)
    return _requested(device, "current") - before, passing


def _requested(device: torch.device, which: str) -> int:
    return int(torch.cuda.memory_stats(device)[_REQUESTED + which])
