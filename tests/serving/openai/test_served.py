"""Bodies as a server takes them."""

from __future__ import annotations

import pytest

from ollm_core.api import load
from ollm_core.serving.openai.limits import LATER, MAX_TEXTS
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.requests import Reader
from ollm_core.serving.openai.served import read_body
from ollm_core.serving.request import SamplingParams, Score


@pytest.fixture(scope="module")
def read(tiny_chat):
    """Reads a body for a tiny model."""
    with load(tiny_chat, device="cpu") as model:
        reader, served = Reader(model.tokenizer), model.served
        yield lambda kind, **fields: read_body(reader, served, kind, fields)


def test_each_prompt_is_asked(read):
    """Texts, or lists of token ids; a single list of ids is one."""
    assert len(read("completion", prompt=["a", "b"]).asked) == 2
    body = read("completion", prompt=[[5, 6], [7]], n=3)
    assert [one.token_ids for one in body.asked] == [[5, 6], [7]]
    assert body.prompts == [None, None]
    assert len(read("completion", prompt=[5, 6]).asked) == 1
    requests, scores = body.requests()
    assert [request.wanted.n for request in requests] == [3, 3]
    assert scores == [None, None]


def test_an_echo_is_scored_where_log_probabilities_are_wanted(read):
    """Each token but the first, with the likeliest, by the answer itself or alone; nothing of a
    prompt of one token.
    """
    fields = {"prompt": [[5, 6, 7], [7]], "echo": True}
    requests, scores = read("completion", **fields, logprobs=0, max_tokens=4).requests()
    assert [request.wanted.max_tokens for request in requests] == [4, 4]
    assert [request.wanted.prompt_logprobs for request in requests] == [1, 1]
    assert scores == [None, None]
    requests, scores = read("completion", **fields, logprobs=3, max_tokens=0).requests()
    assert requests == []
    assert scores[0].wanted == Score(2, top=3)
    assert scores[1] is None
    assert read("completion", **fields).requests()[1] == [None, None]


@pytest.mark.parametrize(
    ("tier", "priority"), [(None, 0), ("auto", 0), ("default", 0), ("flex", LATER)]
)
def test_flex_may_wait(read, tier, priority):
    """OpenAI's word for what is not urgent."""
    requests, _ = read("completion", prompt="a", service_tier=tier).requests()
    assert requests[0].priority == priority


def test_a_body_has_samplings_words(read):
    """As rows have; what is told of streams is no part of them."""
    body = read(
        "chat", messages=[{"role": "user", "content": "x"}], seed=3, max_tokens=5, stream=True,
        stream_options={"include_usage": True}, temperature=0,
    )  # fmt: skip
    assert (body.stream, body.with_usage, body.kind, body.num_answers) == (True, True, "chat", 1)
    assert body.asked[0].sampling == SamplingParams(temperature=0, seed=3, max_tokens=5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream": 1}, "stream: need true or false, have 1"),
        ({"stream_options": {"include_usage": True}}, "need stream to be true"),
        ({"stream": True, "stream_options": {"x": True}}, "need an object with include_usage"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "need true or false"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "not supported"),
        ({"echo": "yes"}, "echo: need true or false"),
        ({"stream": True, "echo": True, "logprobs": 1}, "echo: need stream to be false"),
        ({"max_tokens": 0}, "max_tokens: need a whole number of at least 1"),
        ({"service_tier": "gold"}, "service_tier: need one of"),
        ({"service_tier": ["flex"]}, "service_tier: need one of"),
        ({"prompt": ["a"] * (MAX_TEXTS + 1)}, "prompt: need at most 256"),
        ({"prompt": ["a"] * 200, "n": 2}, "n: need at most 256 answers"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ["a", 3]}, "prompt: need a text or a list"),
        ({"prompt": "a" * 300}, "300 tokens, the model 256 positions"),
    ],
)
def test_what_cannot_be_answered_is_refused(read, fields, message):
    """In one line."""
    with pytest.raises(RefusedError, match=message):
        read("completion", **{"prompt": "a", **fields})


def test_a_chat_has_no_echo(read):
    """It is a field of completions."""
    with pytest.raises(RefusedError, match="echo"):
        read("chat", messages=[{"role": "user", "content": "x"}], echo=True)
