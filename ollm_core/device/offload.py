"""Activation offload: hidden states between layers stay on the device, or go to host memory where
the budget needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_core.device.buffers import put_into


@dataclass(frozen=True, slots=True)
class ActivationOffload:
    """Brings what waits for its turn to the device and back.

    On a CPU, whose host memory is the device's too, it copies as it would to a GPU: the memory of a
    layer's work then does not grow with the prompt, and the two accounts stay two.
    """

    device: torch.device
    on_host: bool

    def store(self, value: Tensor, itemsize: int = 0) -> Tensor:
        """`value`, which the device has, where it can wait: in memory with room for as many numbers
        of `itemsize` bytes, as which `put` may replace it.
        """
        return host_like(value, itemsize).copy_(value) if self.on_host else value

    def zeros_like(self, value: Tensor) -> Tensor:
        """Zeros of its shape and dtype, where they can wait."""
        return host_like(value).zero_() if self.on_host else torch.zeros_like(value)

    def fetch(self, offloaded: Tensor) -> Tensor:
        """What was offloaded, on the device: itself if it is there."""
        if not self.on_host:
            return offloaded
        return torch.empty_like(offloaded, device=self.device).copy_(offloaded)

    def put(self, place: Tensor, value: Tensor) -> Tensor:
        """`value` where `place` is offloaded, in its memory if there is room for its dtype."""
        if not self.on_host or value.dtype == place.dtype:
            return put_into(place, value)
        memory = torch.empty(0, dtype=torch.uint8).set_(place.untyped_storage())
        if memory.nbytes < value.nbytes:
            return self.store(value)
        return _shown(memory, value).copy_(value)

    def rows(self, offloaded: Tensor, indices: Tensor) -> Tensor:
        """Some rows of what was offloaded, on the device. `indices` are offloaded too."""
        return offloaded[indices].to(self.device)

    def add_rows(self, offloaded: Tensor, indices: Tensor, values: Tensor) -> None:
        """Add `values`, which the device has, to some rows. `indices` are offloaded too."""
        offloaded.index_add_(0, indices, values.to(offloaded.device))


def host_like(value: Tensor, itemsize: int = 0) -> Tensor:
    """Host memory for what has the shape and dtype of `value`, and could be of `itemsize`. All that
    is offloaded there is allocated here.
    """
    num_bytes = value.numel() * max(itemsize, value.itemsize)
    memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    return _shown(memory, value)


def _shown(memory: Tensor, value: Tensor) -> Tensor:
    """Bytes as a tensor like `value`."""
    return memory[: value.nbytes].view(value.dtype).view(value.shape)
