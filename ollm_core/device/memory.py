"""Whether a device has memory of its own, decided once, and what follows: where weights are read
into, how host memory is allocated, and whether there are transfers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ollm_core.device.buffers import aligned_buffer, round_up
from ollm_core.device.transfer import Bus, CudaBus, Event
from ollm_core.memory.pair import PerMemory

T = TypeVar("T")


class DeviceMemory(ABC):
    """Where a device keeps what it computes with. Nothing is allocated before it is asked."""

    is_own: bool
    """Whether it is not the host's: units of weights then come to it packed."""

    @abstractmethod
    def beside(self) -> DeviceMemory:
        """The same with other transfers, which do not wait behind those of this one."""

    @abstractmethod
    def read_side(self, pair: PerMemory[T]) -> T:
        """Of a pair, that of the memory which buffers for reading from disk count in."""

    @abstractmethod
    def reads(self, num_bytes: int) -> PerMemory[int]:
        """Bytes of buffers for reading from disk, by the memory that they count in."""

    @abstractmethod
    def host_buffer(self, num_bytes: int, *, huge: bool = True) -> Tensor:
        """Host memory, page-aligned, for bytes that the device is to have. All that is locked is
        made here. `huge`: see `aligned_buffer`; what is locked has huge pages.
        """

    @abstractmethod
    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The same for a tensor, its content undefined. It takes `host_bytes` of its size."""

    @abstractmethod
    def host_bytes(self, num_bytes: int) -> int:
        """What a tensor of `num_bytes` takes of the host."""

    @abstractmethod
    def copied(self) -> Event | None:
        """All copies that were asked for so far have ended; None if there are none."""


class SharedMemory(DeviceMemory):
    """The host's, as on a CPU: all weights count as the device's, and nothing is copied to it."""

    is_own = False

    def beside(self) -> DeviceMemory:
        return self

    def read_side(self, pair: PerMemory[T]) -> T:
        return pair.device

    def reads(self, num_bytes: int) -> PerMemory[int]:
        return PerMemory(num_bytes, 0)

    def host_buffer(self, num_bytes: int, *, huge: bool = True) -> Tensor:
        return aligned_buffer(num_bytes, huge=huge)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def host_bytes(self, num_bytes: int) -> int:
        return num_bytes

    def copied(self) -> Event | None:
        return None


class OwnMemory(DeviceMemory):
    """That of a GPU: what is read from disk is in host memory first, and is copied over a bus."""

    is_own = True

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    def beside(self) -> DeviceMemory:
        return OwnMemory(self.bus.beside())

    def read_side(self, pair: PerMemory[T]) -> T:
        return pair.host

    def reads(self, num_bytes: int) -> PerMemory[int]:
        return PerMemory(0, num_bytes)

    def host_buffer(self, num_bytes: int, *, huge: bool = True) -> Tensor:
        return self.bus.host_buffer(num_bytes)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Of whole pages."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return self.bus.host_buffer(num_bytes).view(dtype).view(tuple(shape))

    def host_bytes(self, num_bytes: int) -> int:
        return round_up(num_bytes)

    def copied(self) -> Event | None:
        return self.bus.copied()


SHARED = SharedMemory()
"""It has no state."""


def memory_of(device: torch.device) -> DeviceMemory:
    """That of a device, which need not be here."""
    return SHARED if device.type in ("cpu", "meta") else OwnMemory(CudaBus(device))
