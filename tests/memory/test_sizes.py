"""Sizes of memory, as people and programs write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ollm_core import InputError
from ollm_core.memory.sizes import format_size, parse_size


@pytest.mark.parametrize(
    "size", [2 * 10**9, 2e9, np.int64(2 * 10**9), np.float32(2e9), "2GB", torch.tensor(2 * 10**9)]
)
def test_a_size(size: Any):
    """A whole number of any type, or with a unit."""
    assert parse_size(size) == 2 * 10**9


@pytest.mark.parametrize(
    "size", [True, 0.5, float("nan"), float("inf"), -2e9, np.bool_(True), None, b"2GB", [1], 1j]
)
def test_what_is_no_size(size: Any):
    """One line."""
    with pytest.raises(InputError, match=r"is not a memory size. hint: "):
        parse_size(size)


def test_a_size_of_many_digits():
    """Is a size that no machine has."""
    assert parse_size("9" * 400 + "GB") > 10**400


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GB", 8 * 10**9), ("512MiB", 512 << 20), ("1.5 gb", 1_500_000_000), ("100B", 100), (7, 7)],
)
def test_sizes(text, num_bytes):
    """Decimal and binary units, any case, ints as bytes."""
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "8 XB", "0GB", "", "1e9B", 0, -5, "eight GB"])
def test_wrong_sizes(text):
    """A size without a unit, negative, zero or unknown is refused in one line with a hint."""
    with pytest.raises(InputError, match="is not a memory size"):
        parse_size(text)


def test_format_size():
    """Three digits, decimal units."""
    assert [format_size(n) for n in (0, 999, 269e6, 1.4567e9)] == [
        "0 B",
        "999 B",
        "269 MB",
        "1.46 GB",
    ]
