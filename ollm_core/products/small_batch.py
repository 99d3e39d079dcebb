"""A compiled product of a few rows with a bfloat16 matrix, bound by memory: each weight is read and
widened once, for all rows.

numba compiles it for the processor at hand (the extra `ollm-core[cpu]`), and keeps the result
beside this file or in the user's cache directory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 24
"""Beyond, tiles for a float32 product are faster."""

_OUTPUTS = 4  # of one turn; with two rows of states they fill the registers of AVX2


class SmallBatch:
    """Calls the compiled kernel, with as many threads as torch has."""

    def __init__(
        self, kernel: Callable[..., None], set_num_threads: Callable[[int], None], most_threads: int
    ) -> None:
        """`kernel` takes arrays: states, weight and bias bits, whether there is a bias, output
        bits.
        """
        self._kernel = kernel
        self._set_num_threads = set_num_threads
        self._most_threads = most_threads
        self._lock = threading.Lock()  # one of numba's threading layers allows one caller at a time
        self._no_bias = torch.empty(0, dtype=torch.bfloat16)

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """output [R, N] = states [R, K] @ weight [N, K].T + bias [N]. `states` are float32, the
        others bfloat16; sums are float32. `weight` has its rows in one piece each.
        """
        added = self._no_bias if bias is None else bias.detach().contiguous()
        with self._lock:
            self._set_num_threads(min(torch.get_num_threads(), self._most_threads))
            bits = [_bits(tensor) for tensor in (weight.detach(), added, output)]
            self._kernel(states.numpy(), *bits[:2], bias is not None, bits[2])


def _bits(tensor: Tensor) -> object:
    return tensor.view(torch.uint16).numpy()


def load_kernel() -> SmallBatch:
    """Raises ImportError without numba."""
    import numba
    import numpy as np

    @numba.njit(inline="always")
    def rounded(value: Any, added: Any) -> Any:
        """A float32 and a bfloat16's bits added -> the nearest bfloat16's bits, ties to even."""
        wide = np.uint32(added) << np.uint32(16)
        bits = np.float32(value + wide.view(np.float32)).view(np.uint32)
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # not a number
            return np.uint16(bits >> np.uint32(16)) | np.uint16(0x40)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    # Sums in any order: without that nothing is vectorised. Not that numbers are finite.
    loose = {"reassoc", "contract", "nsz"}

    @numba.njit(fastmath=loose, nogil=True, parallel=True, cache=True, error_model="numpy")
    def multiply(states: Any, weight: Any, bias: Any, has_bias: bool, output: Any) -> None:
        num_rows, size = states.shape
        num_outputs = weight.shape[0]
        for turn in numba.prange((num_outputs + 3) // 4):
            first = turn * 4
            wide = np.empty((4, size), np.float32)
            bits = wide.view(np.uint32)
            for j in range(4):
                source = min(first + j, num_outputs - 1)
                for k in range(size):
                    bits[j, k] = np.uint32(weight[source, k]) << np.uint32(16)
            for row in range(0, num_rows, 2):
                other = min(row + 1, num_rows - 1)
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
                for k in range(size):
                    x, y = states[row, k], states[other, k]
                    w0, w1, w2, w3 = wide[0, k], wide[1, k], wide[2, k], wide[3, k]
                    a0 += x * w0
                    a1 += x * w1
                    a2 += x * w2
                    a3 += x * w3
                    b0 += y * w0
                    b1 += y * w1
                    b2 += y * w2
                    b3 += y * w3
                sums = ((a0, a1, a2, a3), (b0, b1, b2, b3))
                for i in range(2):
                    if row + i < num_rows:
                        for j in range(min(4, num_outputs - first)):
                            added = bias[first + j] if has_bias else np.uint16(0)
                            output[row + i, first + j] = rounded(sums[i][j], added)

    return SmallBatch(multiply, numba.set_num_threads, numba.get_num_threads())
