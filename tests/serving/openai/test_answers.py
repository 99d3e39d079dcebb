"""Answers in OpenAI's form: both kinds, their log-probabilities, and tokens as text."""

from __future__ import annotations

import pytest

from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.answers import Writer, answer_line, error_line
from ollm_core.serving.openai.requests import Asked
from ollm_core.serving.request import Counts, SamplingParams, TokenLogprobs
from ollm_core.text.tokenizer import open_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_chat):
    """By bytes."""
    return open_tokenizer(tiny_chat)


def answered(tokenizer, text, reason="stop"):
    """An answer whose tokens are the bytes of a text, each with another likely one."""
    ids = tokenizer(text)["input_ids"]
    other = tokenizer("?")["input_ids"][0]
    told = [TokenLogprobs(-1.5, ((other, -0.5), (one, -1.5))) for one in ids]
    return Answered(text, ids, told, None, reason, Counts(num_cached_tokens=2))


def test_a_chat(tokenizer):
    """With the fields that clients read."""
    asked = Asked("chat", [1, 2, 3], SamplingParams(n=2))
    answers = [answered(tokenizer, "Hi"), answered(tokenizer, "Oh!", "length")]
    body = Writer(tokenizer, "tiny").body(asked, answers)
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    assert body["id"].startswith("chatcmpl-")
    assert [one["message"]["content"] for one in body["choices"]] == ["Hi", "Oh!"]
    assert [one["finish_reason"] for one in body["choices"]] == ["stop", "length"]
    assert [one["index"] for one in body["choices"]] == [0, 1]
    assert {one["logprobs"] for one in body["choices"]} == {None}
    assert body["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


def test_logprobs_of_a_chat(tokenizer):
    """A token that is a part of a character has no text of its own."""
    asked = Asked("chat", [1], SamplingParams(logprobs=2))
    [choice] = Writer(tokenizer, "t").body(asked, [answered(tokenizer, " aé")])["choices"]
    space, letter, *parts = choice["logprobs"]["content"]
    assert (space["token"], space["bytes"], space["logprob"]) == (" ", [32], -1.5)
    assert (letter["token"], letter["bytes"]) == ("a", [97])
    assert [one["bytes"] for one in parts] == [None, None]
    assert [one["token"] for one in space["top_logprobs"]] == ["?", " "]


def test_logprobs_of_a_completion(tokenizer):
    """In lists; the new token is among the likeliest."""
    asked = Asked("completion", [1], SamplingParams(logprobs=1))
    body = Writer(tokenizer, "t").body(asked, [answered(tokenizer, "ab c")])
    assert body["object"] == "text_completion"
    [choice] = body["choices"]
    assert choice["text"] == "ab c"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", " ", "c"],
        "token_logprobs": [-1.5] * 4,
        "top_logprobs": [{"?": -0.5, one: -1.5} for one in "ab c"],
        "text_offset": [0, 1, 2, 3],
    }


def test_no_answer_has_no_logprobs_but_is_there(tokenizer):
    """An empty list where they were asked for, and nothing was said."""
    asked = Asked("chat", [1], SamplingParams(logprobs=0))
    [choice] = Writer(tokenizer, "t").body(asked, [Answered(finish_reason="stop")])["choices"]
    assert choice["logprobs"]["content"] == []


def test_a_space_before_a_word_is_kept(smollm2):
    """Also by a tokenizer of words."""
    tokenizer = open_tokenizer(smollm2)
    writer = Writer(tokenizer, "t")
    ids = tokenizer(" Paris is\nhere")["input_ids"]
    assert "".join(map(writer._text, ids)) == " Paris is\nhere"


def test_lines():
    """Of the output and of the error file."""
    line = answer_line("a", {"x": 1})
    assert (line["custom_id"], line["error"]) == ("a", None)
    assert line["response"]["status_code"] == 200
    assert line["response"]["body"] == {"x": 1}
    assert line["id"] != answer_line("a", {})["id"]
    line = error_line(None, 7, "code", "why", "n")
    assert (line["custom_id"], line["response"]) == (None, None)
    assert line["error"] == {"code": "code", "message": "why", "param": "n", "line": 7}
