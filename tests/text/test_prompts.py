"""Prompts of texts and of conversations."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from ollm_core.errors import InputError
from ollm_core.text.prompts import PromptEncoder


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    """That of a real model."""
    return AutoTokenizer.from_pretrained(smollm2)


def test_texts_are_the_users(tokenizer):
    """After the system message, as transformers writes it; raw ones as they are."""
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    [found] = PromptEncoder(tokenizer, "be brief").of_texts(["why?"])
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == whole
    assert PromptEncoder(tokenizer).of_chats([messages]) == [whole]
    assert PromptEncoder(tokenizer, raw=True).of_texts(["why?"]) == [tokenizer("why?")["input_ids"]]


def test_what_a_model_does_not_have(tokenizer):
    """Without a tokenizer, a template, or what a template does not ask for."""
    with pytest.raises(InputError, match="the model has no tokenizer"):
        PromptEncoder(None)
    with pytest.raises(InputError, match="no chat template"):
        PromptEncoder(tokenizer, "be brief", raw=True)
    with pytest.raises(InputError, match="no chat template"):
        PromptEncoder(tokenizer, raw=True).of_chats([[{"role": "user", "content": "why?"}]])
    with pytest.raises(InputError, match="no reasoning effort"):
        PromptEncoder(tokenizer, options={"reasoning_effort": "low"})
