"""The kernels of `small_batch`, compiled by numba for this processor and kept in its cache."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# Sums in any order: without that nothing is vectorised. Not that numbers are finite.
_LOOSE = {"reassoc", "contract", "nsz"}


@numba.njit(inline="always")
def rounded(value: Any) -> Any:
    """A float32 -> the bits of the nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    if (bits & 0x7FFFFFFF) > 0x7F800000:  # not a number
        return np.uint16((bits >> 16) | 0x40)
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@numba.njit(fastmath=_LOOSE, nogil=True, parallel=True, cache=True, error_model="numpy")
def multiply_one(states: Any, weight: Any, bias: Any, output: Any) -> None:
    """`multiply` for one row: every weight is read once and used at once."""
    num_outputs, size = weight.shape
    for j in numba.prange(num_outputs):
        total = np.float32(0)
        for k in range(size):
            wide = np.uint32(np.uint32(weight[j, k]) << np.uint32(16)).view(np.float32)
            total += states[0, k] * wide
        output[0, j] = rounded(total + bias[j] if len(bias) else total)


@numba.njit(fastmath=_LOOSE, nogil=True, parallel=True, cache=True, error_model="numpy")
def multiply(states: Any, weight: Any, bias: Any, output: Any) -> None:
    """output [R, N] = states [R, K] @ weight [N, K].T + bias [N], or without a bias where that is
    empty. `states` and `bias` are float32, `weight` and `output` the bits of bfloat16.

    Four weights' rows are widened at a time, and each pair of rows of states is multiplied with all
    four: eight sums in registers.
    """
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
                        added = bias[first + j] if len(bias) else np.float32(0)
                        output[row + i, first + j] = rounded(sums[i][j] + added)
