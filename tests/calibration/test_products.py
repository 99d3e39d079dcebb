"""Rates of products by rows: measured for each precision, and what lies between them."""

from __future__ import annotations

import pytest
import torch

from ollm_core.calibration import products
from ollm_core.products.select import without_instructions


def test_each_number_of_rows_has_a_rate(monkeypatch):
    """For both precisions, with and without instructions of the processor."""
    monkeypatch.setattr(products, "_SHAPE", {"cpu": (64, 48)})
    monkeypatch.setattr(products, "_COLD_BYTES", 1 << 16)
    with without_instructions():
        for precision in ("fast", "exact"):
            found = products.measure_products(torch.device("cpu"), torch.bfloat16, precision)
            assert tuple(found) == products.ROWS
            assert min(found.values()) > 0


def test_between_and_beyond_what_was_measured():
    """A straight line of seconds between; one row's seconds below, the last rate above."""
    rates = {1: 2.0, 9: 9.0}  # a weight takes 1 s with one row, 2 s with nine
    assert products.seconds_per_weight(rates, 0.5) == 1
    assert products.seconds_per_weight(rates, 1) == 1
    assert products.seconds_per_weight(rates, 5) == 1.5
    assert products.seconds_per_weight(rates, 9) == 2
    assert products.seconds_per_weight(rates, 18) == 4
    assert products.flop_rate(rates, 5) == pytest.approx(2 * 5 / 1.5)
