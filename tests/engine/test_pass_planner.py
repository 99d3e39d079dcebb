"""A run for whose last token there is no memory is refused before its first."""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core import DoesNotFitError


def run(directory, prompts, num_new, mask=None, **options):
    """Greedy tokens, none of them the last of a text, and the model's stats or its refusal."""
    with ollm.load(directory, device="cpu", attention="exact", **options) as model:
        try:
            model.generate(
                prompts,
                attention_mask=mask,
                max_new_tokens=num_new,
                min_new_tokens=num_new,
                do_sample=False,
                pad_token_id=0,
            )
        except DoesNotFitError as refused:
            return refused, model.stats
        return None, model.stats


@pytest.mark.parametrize("kv", ["device", "host"])
def test_the_least_that_is_named_does_and_less_is_refused_at_once(tiny, ids, kv):
    """Whichever memory the keys and values of 700 tokens are in."""
    name = f"{kv}_memory"
    budgets = {"device_memory": 4_000_000, "host_memory": 4_000_000, name: 200_000}
    for _ in range(5):
        refused, stats = run(tiny, ids(40)[None], 660, kv=kv, **budgets)
        if refused is None:
            break
        assert (stats.weight_passes, stats.weight_bytes_read) == (0, 0)
        assert refused.memory == name.replace("_", " ")
        budgets[name] = refused.needed_bytes
    assert refused is None
    assert stats.weight_passes == 660
    budgets[name] -= 1
    refused, stats = run(tiny, ids(40)[None], 660, kv=kv, **budgets)
    assert refused.needed_bytes == budgets[name] + 1
    assert stats.weight_passes == 0
    assert "after" in str(refused)


def test_padding_takes_no_room(tiny, ids):
    """Rows count as long as they are: the same host memory does for a batch that is padded."""
    prompts = ids(2 * 500).view(2, 500)
    mask = torch.ones_like(prompts)
    mask[0, :490] = 0
    budgets = {"device_memory": 8_000_000, "host_memory": 1, "kv": "host"}
    needed = {}
    for name, given in (("padded", mask), ("whole", None)):
        refused, _ = run(tiny, prompts, 8, given, **budgets)
        needed[name] = refused.needed_bytes
    assert needed["padded"] < needed["whole"]
    refused, stats = run(tiny, prompts, 8, mask, **budgets | {"host_memory": needed["padded"]})
    assert refused is None
    assert stats.weight_passes == 8
