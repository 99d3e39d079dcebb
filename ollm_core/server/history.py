"""How much memory was used lately."""

from __future__ import annotations

import threading
import time
from collections import deque

from ollm_core.memory.accounts import Accounts

SECONDS = 600
"""That are remembered."""
_BETWEEN = 2.0
"""Seconds between two samples."""


class MemoryHistory:
    """Samples of what was used. Passes note them from their thread, others read."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=int(SECONDS / _BETWEEN) + 1)

    def note(self) -> None:
        """Take a sample; soon after another one, what is higher takes that one's place."""
        now, accounts = time.monotonic(), self._accounts
        used = accounts.device.used, accounts.host.used
        samples = self._samples
        with self._lock:
            if samples and now < samples[-1][0] + _BETWEEN:
                began, device, host = samples.pop()
                samples.append((began, max(device, used[0]), max(host, used[1])))
            else:
                samples.append((now, *used))

    def read(self) -> list[tuple[float, int, int]]:
        """Seconds ago, bytes of device memory and of host memory; the oldest first."""
        now = time.monotonic()
        with self._lock:
            samples = [*self._samples]
        return [
            (round(now - at, 1), device, host)
            for at, device, host in samples
            if now - at <= SECONDS
        ]
