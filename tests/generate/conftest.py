"""A model whose `generate` is transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import ollm
from ollm_core.testing import StreamedModel


@pytest.fixture
def model(tiny: Path) -> Iterator[StreamedModel]:
    """A tiny model with room for everything."""
    with ollm.load(tiny, device="cpu", chunk_size=64) as opened:
        yield opened
