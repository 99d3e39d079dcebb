"""What checks ask of the model under test is what they compare it with."""

from __future__ import annotations

import torch
from families import Qwen3

from ollm_conformance.subject import Subject, generate


def test_a_zero_in_a_prompt_is_a_token(tmp_path):
    """Random models say it, too: taken for padding, it would change what comes after."""
    subject = Subject(Qwen3(), tmp_path)
    prompt = torch.cat([subject.prompt(20), torch.zeros(3, dtype=torch.long), subject.prompt(9, 1)])
    tokens = subject.reference().greedy(prompt, 8)[0]
    with subject.open() as model:
        assert generate(model, prompt[None], 8)[0, len(prompt) :].tolist() == tokens
        padding = (prompt != 0).long()[None]
        masked = generate(model, prompt[None], 8, attention_mask=padding)
        assert masked[0, len(prompt) :].tolist() != tokens
