"""Weights that are made anew in each pass, as for another dtype: one layer's at a time."""

from __future__ import annotations

import gc

import pytest
import torch

import ollm
from ollm_conformance.allocated import live_bytes
from ollm_core.testing import TierTracker

OPTIONS = {"device": "cpu", "kv": "device", "attention": "exact"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_copies_of_one_layer_are_gone_before_the_next(make_llama, ids, dtype):
    """What is allocated stays inside the least memory, most of which such copies are."""
    directory = make_llama(torch.bfloat16, hidden_size=256, intermediate_size=1024)
    least = ollm.plan(
        directory, dtype=dtype, context=33, max_new_tokens=1, **OPTIONS
    ).smallest_device_bytes
    gc.collect()
    before = live_bytes()
    with ollm.load(directory, dtype=dtype, device_memory=least, **OPTIONS) as model:
        with TierTracker(kv_on_device=True) as tracker:
            model(input_ids=ids(32)[None], logits_to_keep=1)
        assert model.stats.resident_bytes == 0
        measured = live_bytes() - before - tracker.used + tracker.peak
    assert measured <= least <= 1.1 * measured
