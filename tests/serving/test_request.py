"""Sampling parameters are checked when they are made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ollm_core.errors import InputError
from ollm_core.serving.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -1}, "min_p is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"n": 0}, "n is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens is 3, expected at most max_tokens, 2"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"seed": 1 << 63}, "seed is"),
        ({"stop": [""]}, "stop: need text"),
        ({"stop": ["x"] * 65}, "stop: need at most 64 texts, have 65"),
    ],
)
def test_values_out_of_range_are_refused(wrong, words):
    """With what was given, and what was expected."""
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        SamplingParams(**wrong)


def test_forms_that_vllm_takes():
    """One stop text or several, -1 for all tokens."""
    assert SamplingParams(stop="end").stops == ("end",)
    assert SamplingParams(stop=["a", "b"], top_k=-1).stops == ("a", "b")


def test_more_special_tokens_are_shown():
    """Beside those that were asked for; all else stays."""
    wanted = SamplingParams(temperature=0.5, shown_token_ids=[3])
    assert wanted.showing([7, 9]) == replace(wanted, shown_token_ids=(3, 7, 9))
    assert wanted.shown_token_ids == (3,)


def test_requests_have_names_of_their_own():
    """Unless they are given one."""
    first, second = (Request(token_ids=[1], wanted=SamplingParams()) for _ in range(2))
    assert first.request_id != second.request_id
