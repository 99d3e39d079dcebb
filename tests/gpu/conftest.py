"""Where these tests run: on a CUDA device, and skipped where there is none.

OLLM_TEST_DEVICE=cpu tries the tests themselves on a machine without one.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> str:
    """What the model computes on."""
    name = os.environ.get("OLLM_TEST_DEVICE", "cuda:0")
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


@pytest.fixture
def card(device: str) -> str:
    """The same, for what only CUDA's allocator can tell."""
    if device == "cpu":
        pytest.skip("no allocator of CUDA's")
    return device


@pytest.fixture
def streamed(device: str) -> dict[str, int]:
    """Options with which all layers come from the disk in each pass."""
    return {"device_layers": 0} if device == "cpu" else {"device_layers": 0, "host_layers": 0}
