"""Measures matrix products by the rows of states that they multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from ollm_core.calibration.timing import least_seconds
from ollm_core.products.select import choose_products

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
_SHAPE = {"cpu": (4096, 2048), "cuda": (8192, 8192)}
_COLD_BYTES = 256 << 20  # of weights that are gone through together: no cache holds them
_WARM = 64  # rows from which on the cache is no matter


def measure_products(
    device: torch.device, dtype: torch.dtype, precision: str
) -> Mapping[int, float]:
    """FLOP per second of products in `dtype`, as a run with `precision` has them, by rows."""
    shape = _SHAPE[device.type]
    weight_bytes = shape[0] * shape[1] * dtype.itemsize
    matrices = [
        torch.randn(shape, device=device).to(dtype) for _ in range(_COLD_BYTES // weight_bytes)
    ]
    products = choose_products(dtype, device, precision)
    weights = [products.weight(one) if products else one for one in matrices]
    found = {}
    for rows in ROWS:
        states = torch.randn(rows, shape[1], device=device).to(dtype)
        chosen = weights if rows < _WARM else weights[:1]
        seconds = least_seconds(_through(states, chosen), device) / len(chosen)
        found[rows] = 2 * rows * shape[0] * shape[1] / seconds
    if products:
        products.close()
    return MappingProxyType(found)


def _through(states: Tensor, weights: list[Tensor]) -> Callable[[], None]:
    def work() -> None:
        for weight in weights:
            functional.linear(states, weight)

    return work


def seconds_per_weight(by_rows: Mapping[int, float], rows: float) -> float:
    """What one weight costs in a product with `rows` rows, by rates as above: between those that
    were measured as a straight line, beyond them as the rates at the ends.
    """
    known = sorted((measured, 2 * measured / rate) for measured, rate in by_rows.items())
    first, last = known[0], known[-1]
    if rows <= first[0]:
        return first[1]
    for (low, cheap), (high, dear) in pairwise(known):
        if rows <= high:
            return cheap + (dear - cheap) * (rows - low) / (high - low)
    return last[1] * rows / last[0]


def flop_rate(by_rows: Mapping[int, float], rows: float) -> float:
    """FLOP per second with `rows` rows, from rates as above."""
    return 2 * rows / seconds_per_weight(by_rows, rows)
