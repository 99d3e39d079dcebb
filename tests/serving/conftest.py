"""A tiny model with everything in memory, and texts for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ollm_core.api import load

TextIds = Callable[..., list[int]]


@pytest.fixture
def model(make_llama) -> Iterator[Any]:
    """A tiny float32 Llama: greedy tokens do not depend on what runs beside them."""
    with load(make_llama(torch.float32), device="cpu", chunk_size=64) as opened:
        yield opened


@pytest.fixture
def ids() -> TextIds:
    """Token ids of a text, none of them special; the same for the same seed."""

    def make(num_tokens: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 199, (num_tokens,), generator=generator).tolist()

    return make


@pytest.fixture
def alone(model) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of one prompt, as transformers' `generate` finds them."""

    def run(prompt: list[int], num_new: int) -> list[int]:
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=num_new, do_sample=False, eos_token_id=None
        )
        return found[0, len(prompt) :].tolist()

    return run
