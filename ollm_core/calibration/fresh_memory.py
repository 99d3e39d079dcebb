"""Measures how fast the system gives memory that was not used before."""

from __future__ import annotations

import time

from ollm_core.device.buffers import PAGE, aligned_buffer

_NUM_BYTES = 256 << 20


def measure_fresh_memory(num_bytes: int = _NUM_BYTES) -> float:
    """Bytes per second of a buffer for weights that stay, on pages as small as they come: one byte
    of each is written, and the system clears the rest.
    """
    buffer = aligned_buffer(num_bytes, huge=False)
    start = time.perf_counter()
    buffer[::PAGE] = 1
    return num_bytes / max(time.perf_counter() - start, 1e-9)
