"""PerMemory: a value for the device's memory and one for the host's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class PerMemory(NamedTuple, Generic[T]):
    """Bytes, accounts, limits or what else there is one of for the device and one for the host. On
    a CPU, which computes in the host's memory, there are two all the same.
    """

    device: T
    host: T

    def map(self, function: Callable[[T], U]) -> PerMemory[U]:
        """The same of `function` of each."""
        return PerMemory(function(self.device), function(self.host))


def added(*pairs: PerMemory[int]) -> PerMemory[int]:
    """The sum, memory by memory."""
    return PerMemory(sum(pair.device for pair in pairs), sum(pair.host for pair in pairs))
