"""The way from host memory to a device: one device buffer, filled on the stream that computes."""

from __future__ import annotations

import torch
from torch import Tensor


class Upload:
    """Copies a host buffer to a device buffer that is reused: stream order keeps copy and compute
    apart.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """`num_bytes` is the largest buffer that will be copied. Allocated with the first copy."""
        self.num_bytes = num_bytes
        self._device = device
        self._buffer: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def copy(self, host: Tensor) -> Tensor:
        """The bytes of `host` on the device, valid until the next copy. `host` may be reused after
        `wait`.
        """
        if self._buffer is None or self._copied is None:
            self._buffer = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
            self._copied = torch.cuda.Event()
        target = self._buffer[: host.numel()]
        target.copy_(host, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(target.device))
        return target

    def wait(self) -> None:
        """Return when the last copy has read all of its host buffer."""
        if self._copied is not None:
            self._copied.synchronize()
