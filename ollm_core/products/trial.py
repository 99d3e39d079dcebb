"""Whether a compiled product works on this processor: shown by a trial."""

from __future__ import annotations

import torch

from ollm_core.products.small_batch import SmallBatch

_LARGEST_ERROR = 2.0**-7
"""Of a result of the size of 1, which is rounded to bfloat16 at the end."""
_CALLS = ((1, 64, 96), (1, 5, 257), (2, 64, 96), (3, 13, 257), (16, 7, 64), (5, 1, 8))
"""Rows, outputs and numbers of a state."""


def trial(kernel: SmallBatch) -> str:
    """Why `kernel` cannot be used here, in one line; empty if every kind of call gave what float32
    products give.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    for num_rows, num_outputs, size in _CALLS:
        states = random(num_rows, size) / size**0.5
        weight, bias = random(num_outputs, size), random(num_outputs)
        expected = states.float() @ weight.float().t() + bias.float()
        found = torch.full((num_rows, num_outputs), float("nan"), dtype=torch.bfloat16)
        try:
            kernel(states.float(), weight, bias, found)
        except Exception as error:  # noqa: BLE001 # a compiler's errors have no common class
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not bool(
            ((found.float() - expected).abs() <= _LARGEST_ERROR * (1 + expected.abs())).all()
        ):
            return (
                f"it gives other numbers than float32 does for {num_rows} rows and a matrix "
                f"{[num_outputs, size]}"
            )
    return ""
