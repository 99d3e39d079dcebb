"""The dtypes of models."""

import torch

from ollm_core import values
from ollm_core.device.dtypes import DTYPES, HALF


def test_dtypes_are_those_that_options_take():
    """Each by the name that options have for it; two bytes an element is half precision."""
    assert {name: str(dtype) for name, dtype in DTYPES.items()} == {
        name: f"torch.{name}" for name in values.DTYPES
    }
    assert {dtype for dtype in DTYPES.values() if dtype.itemsize == 2} == HALF
    assert torch.float32 not in HALF
