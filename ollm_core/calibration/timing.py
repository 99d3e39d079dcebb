"""How long some work takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_REPEATS = 5


def least_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of some tries of `work`, each waited for."""
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)
