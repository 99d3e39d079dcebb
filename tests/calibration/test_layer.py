"""What a layer costs by itself is measured in a moment, in any dtype."""

from __future__ import annotations

import pytest
import torch

from ollm_core.calibration import layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_and_numbers_per_second(dtype, monkeypatch):
    """Both are positive; a call makes fewer than it could numbers of a large layer."""
    monkeypatch.setattr(layer, "_LARGE", layer._Sizes(64, 176, 4, 2))
    monkeypatch.setattr(layer, "_NEW_TOKENS", 8)
    monkeypatch.setattr(layer, "_CALLS", 1)
    calls, numbers = layer.measure_layer(torch.device("cpu"), dtype)
    assert 0 < calls < numbers
    sizes = layer._Sizes(8, 16, 4, 2)
    assert sizes.outputs == 8 + 2 * 2 * 2 + 8 + 2 * 16 + 8
