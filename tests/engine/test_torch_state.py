"""What callers set for their own torch code changes no bit of a model's."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_conformance.subject import Subject

SHORT = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@contextmanager
def default_device(device):
    """torch.set_default_device, undone at the end."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    """torch.set_default_dtype, undone at the end."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another default device": lambda: default_device("meta"),
    "a device for a with block": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("draft", ["none", "model"])
def test_no_state_of_the_caller_counts(tiny, ids, state, draft):
    """While the model is opened, while it runs, and when it goes on without."""
    batch, mask = ids(300)[None].repeat(1, 2), torch.ones(1, 600, dtype=torch.long)
    mask[0, :7] = 0
    options = {"device": "cpu", "kv": "disk", "device_memory": "8MB", "draft": draft}
    options |= {"draft_model": tiny} if draft == "model" else {}
    with ollm.load(tiny, **options) as model:
        expected = model(batch, mask).logits
        tokens = model.generate(batch, attention_mask=mask, **SHORT)
    with state():
        model = ollm.load(tiny, **options)
    with model:
        with state():
            cache = model.new_cache()
            inside = model(batch, mask, past_key_values=cache).logits
            cache.crop(-10)
        assert torch.equal(inside, expected)
        assert not inside.requires_grad
        again = model(batch[:, -10:], mask, past_key_values=cache).logits
        assert torch.allclose(again, expected[:, -10:], atol=1e-4)
        with state():
            inside = model.generate(batch, attention_mask=mask, **SHORT)
        assert torch.equal(inside, tokens)
        assert torch.equal(model.generate(batch, attention_mask=mask, **SHORT), tokens)


def test_routed_experts_under_another_default_dtype(tmp_path):
    """Which experts are kept is counted in a dtype of its own."""
    subject = Subject(GptOssAdapter(), tmp_path)
    prompt = subject.prompt(30)[None]
    with subject.open(subject.tiny()) as model:
        expected = model(prompt).logits
    with default_dtype(torch.float64), subject.open(subject.tiny()) as model:
        assert torch.equal(model(prompt).logits, expected)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_no_state_of_the_caller_is_planned_for(tiny, state):
    """A plan is the same to the byte."""
    options = {"device": "cpu", "device_memory": "8MB", "host_memory": "64MB"}
    options |= {"context": 600, "max_new_tokens": 4}
    expected = ollm.plan(tiny, **options)
    with state():
        assert ollm.plan(tiny, **options) == expected
