"""Reads of a tiny Llama, counted and made to fail."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from ollm_core import ReadError
from ollm_core.testing import counted_reads, failing_reads, weight_tensors

IDS = torch.arange(10, 30)


def test_reads_are_counted(small):
    """A pass asks for the tensors of `weight_tensors`, each once, and only inside of the block."""
    model, wanted = small, {tensor.name for tensor in weight_tensors(small)}
    model(input_ids=IDS[None])  # which reads ahead for the next
    with counted_reads(model) as seen:
        for _ in range(2):
            model(input_ids=IDS[None])
    assert seen.keys() <= wanted
    assert any(".layers.1." in name for name in seen)
    before = seen.total()
    model(input_ids=IDS[None])
    assert seen.total() == before


def test_reads_fail_and_the_model_goes_on(small):
    """After so many reads each is refused, and none is after the block."""
    expected = small(input_ids=IDS[None]).logits
    for after in (0, 1):
        with failing_reads(small, after):
            with suppress(ReadError):  # what was read ahead is used up
                small(input_ids=IDS[None])
            with pytest.raises(ReadError, match="the disk is gone"):
                small(input_ids=IDS[None])
    assert torch.equal(small(input_ids=IDS[None]).logits, expected)
