"""A product of one or a few rows with a bfloat16 matrix that is bound by memory: each weight is
read and widened once, for all rows. It is compiled (the extra `ollm-core[cpu]`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

MOST_ROWS = 32
"""Beyond, tiles for a float32 product are faster."""


class SmallBatch:
    """Calls the compiled kernels, with as many threads as torch has."""

    def __init__(
        self,
        for_one: Callable[..., None],
        for_more: Callable[..., None],
        set_num_threads: Callable[[int], None],
        most_threads: int,
    ) -> None:
        """A kernel for one row and one for more. Both take arrays: states, the bits of a weight, a
        bias or nothing, and the bits of the output.
        """
        self._for_one, self._for_more = for_one, for_more
        self._set_num_threads = set_num_threads
        self._most_threads = most_threads
        self._lock = threading.Lock()  # one of numba's threading layers allows one caller at a time

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """output [R, N] = states [R, K] @ weight [N, K].T + bias [N]. `states` are float32, the
        others bfloat16, sums float32. `weight` has its rows in one piece each.
        """
        added = torch.empty(0) if bias is None else bias.detach().float()
        kernel = self._for_one if len(states) == 1 else self._for_more
        with self._lock:
            self._set_num_threads(min(torch.get_num_threads(), self._most_threads))
            kernel(
                states.numpy(), _bits(weight.detach()), added.contiguous().numpy(), _bits(output)
            )


def _bits(tensor: Tensor) -> object:
    return tensor.view(torch.uint16).numpy()


def load_kernel() -> SmallBatch:
    """Raises ImportError without numba."""
    num_threads = torch.get_num_threads()
    import numba

    from ollm_core.products.compiled import multiply, multiply_one

    most_threads = numba.get_num_threads()  # starts its threads
    if torch.get_num_threads() != num_threads:  # which may have set those of OpenMP, torch's too
        torch.set_num_threads(num_threads)
    return SmallBatch(multiply_one, multiply, numba.set_num_threads, most_threads)
