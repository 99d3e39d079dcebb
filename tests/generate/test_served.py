"""Requests to a streamed model beside `generate`."""

from __future__ import annotations

import pytest
import torch

from ollm_core.errors import InputError
from ollm_core.serving.request import Request, SamplingParams


def test_scores_of_token_ids(model, ids):
    """As the forward pass has them; one weight pass for short prompts."""
    prompt, ends = ids(20).tolist(), [ids(3, seed=1).tolist(), ids(1, seed=2).tolist()]
    found = model.score(prompt, ends)
    assert model.stats.weight_passes == 1
    for end, scores in zip(ends, found, strict=True):
        logits = model(input_ids=torch.tensor([prompt + end])).logits[0].log_softmax(-1)
        expected = logits[len(prompt) - 1 : -1][range(len(end)), end]
        assert torch.allclose(torch.tensor(scores), expected, atol=1e-4)


def test_a_long_prompt_is_scored_in_two_passes(model, ids):
    """The first reads it, the second all continuations."""
    model.score(ids(300).tolist(), [ids(3, seed=seed).tolist() for seed in range(4)])
    assert model.stats.weight_passes == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], [[5]]), "need a prompt of at least one token"),
        (([5], [[]]), "need a continuation of at least one token"),
        (("text", [[5]]), "the model has no tokenizer"),
    ],
)
def test_what_cannot_be_scored(model, arguments, words):
    """One line each."""
    with pytest.raises(InputError, match=words):
        model.score(*arguments)
    assert model.score([5], []) == []


def test_a_closed_model_answers_nothing(model):
    """As `generate` does."""
    model.close()
    with pytest.raises(InputError, match="the model is closed"):
        model.answer([Request(token_ids=[5], wanted=SamplingParams())])


def test_a_scheduler_is_closed_with_its_model(model):
    """What it holds is given back."""
    scheduler = model.open_scheduler()
    scheduler.add(Request(token_ids=[5], wanted=SamplingParams(max_tokens=2)))
    scheduler.step()
    model.close()
    assert model.accounts.device.used == 0
