"""Chunks of a stream, in OpenAI's form."""

from __future__ import annotations

import pytest

from ollm_core.serving.openai.answers import Writer
from ollm_core.serving.openai.chunks import Chunks
from ollm_core.serving.request import NewToken, TokenLogprobs
from ollm_core.text.tokenizer import open_tokenizer


@pytest.fixture(scope="module")
def writer(tiny_chat):
    """By bytes."""
    return Writer(open_tokenizer(tiny_chat), "tiny")


def token(text: str, token_id: int = 50) -> NewToken:
    """A token that is told with its log-probability."""
    return NewToken("r", 0, token_id, text, TokenLogprobs(-0.5, ((token_id, -0.5),)))


def test_a_chat_begins_with_its_role(writer):
    """Then pieces, the rest, and the reason; a token without text yet is nothing."""
    chunks = Chunks(writer, "chat", wants_logprobs=False, with_usage=False)
    made = [chunks.first(0), *chunks.token(0, token("a")), *chunks.last(0, "b", "stop")]
    assert chunks.token(0, token("")) == []
    assert [one["choices"][0]["delta"] for one in made] == [
        {"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {},
    ]  # fmt: skip
    assert [one["choices"][0]["finish_reason"] for one in made] == [None, None, None, "stop"]
    assert {one["object"] for one in made} == {"chat.completion.chunk"}
    assert len({one["id"] for one in made}) == 1
    assert "usage" not in made[0]


def test_places_in_a_completion_follow_its_echo(writer):
    """Of each choice by itself."""
    chunks = Chunks(writer, "completion", wants_logprobs=True, with_usage=True)
    assert chunks.first(1) is None
    assert chunks.first(0, "abc")["choices"][0]["text"] == "abc"
    offsets = [
        chunks.token(index, token(""))[0]["choices"][0]["logprobs"]["text_offset"]
        for index in (0, 0, 1)
    ]
    assert offsets == [[3], [4], [0]]
    [end] = chunks.last(0, "", "length")
    assert (end["object"], end["usage"], end["choices"][0]["text"]) == ("text_completion", None, "")
    assert chunks.usage({"total_tokens": 3})["usage"] == {"total_tokens": 3}
