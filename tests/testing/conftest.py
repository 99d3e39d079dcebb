"""A model for what `ollm_core.testing` does to one."""

from __future__ import annotations

import pytest

import ollm


@pytest.fixture
def small(tiny):
    """A model that keeps no layer, so that each pass reads."""
    with ollm.load(tiny, device="cpu", device_memory="1GB", device_layers=0) as model:
        yield model
