"""Limits CUDA's allocator to the device's budget: memory that no account knows of then fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ollm_core.memory.accounts import MemoryAccount

_SLACK_BYTES = 128 << 20
"""Allowed beside the budget: workspaces of matrix libraries, which the allocator makes for them."""
_SLACK_PART = 16
"""And this part of the budget, for gaps between blocks, which count as taken."""


class CudaMemory(Protocol):
    """What is asked of `torch.cuda`."""

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        """Free and all bytes of the device."""

    def memory_allocated(self, device: torch.device) -> int:
        """Bytes of this process's tensors. The CUDA context is not among them, nor is it limited:
        both calls below are about the allocator alone.
        """

    def get_per_process_memory_fraction(self, device: torch.device) -> float:
        """What the allocator may take of the device, 1.0 being all."""

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        """Limit it. Before it fails it gives back what it has cached."""


class AllocatorCap:
    """Limits the allocator during weight passes. Between them a process may do as it likes, so
    there is nothing to give back when a model is closed.

    The limit is of the whole process. Tensors of others keep the room that they have, and a limit
    that is already there, of another model's pass or the user's, is raised by this budget.
    """

    def __init__(
        self, account: MemoryAccount, device: torch.device, cuda: CudaMemory = torch.cuda
    ) -> None:
        """To be made before anything of the model is on the device; `account` is the device's."""
        self._account = account
        self._device = device
        self._cuda = cuda
        _, self._total = cuda.mem_get_info(device)
        self._others = cuda.memory_allocated(device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the limit for the length of a `with` block."""
        cuda, device = self._cuda, self._device
        before = cuda.get_per_process_memory_fraction(device)
        fraction = min((self._room() + self._taken(before)) / self._total, 1.0)
        cuda.set_per_process_memory_fraction(fraction, device)
        mine = cuda.get_per_process_memory_fraction(device)
        try:
            yield
        finally:
            # Passes of two models on two threads end in any order. If another one has changed the
            # limit since, none is better than one that nobody takes back.
            undisturbed = cuda.get_per_process_memory_fraction(device) == mine
            cuda.set_per_process_memory_fraction(before if undisturbed else 1.0, device)

    def _room(self) -> int:
        limit = self._account.limit
        return limit + limit // _SLACK_PART + _SLACK_BYTES

    def _taken(self, fraction: float) -> int:
        """What is allowed to others already, or what they hold."""
        if fraction < 1.0:
            return int(fraction * self._total)
        held = self._cuda.memory_allocated(self._device) - self._account.used
        return max(self._others, held)


def free_device_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a CUDA device now: what nobody has, and what the allocator has
    cached.
    """
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
