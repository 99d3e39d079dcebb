"""Questions on one document: prompts, lengths, and parts of what is too long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ollm_core.errors import InputError
from ollm_core.serving.asking.questions import (
    check_length,
    combining,
    cut_document,
    joined,
    part_texts,
    question_prompts,
)
from ollm_core.text.prompts import PromptEncoder


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    """That of a real model."""
    return AutoTokenizer.from_pretrained(smollm2)


def test_a_document_stands_before_each_question():
    """Blank parts are left out."""
    assert joined("document", " ", "why?") == "document\n\nwhy?"
    assert combining("why?", [" because ", "so"]).endswith("Part 1: because\n\nPart 2: so\n\nwhy?")


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([], "there is no question"),
        (["x", "  "], "question 2 is empty"),
        (["x"] * 4097, "need at most 4096, have 4097"),
    ],
)
def test_questions_that_are_none(tokenizer, questions, words):
    """One line each."""
    with pytest.raises(InputError, match=words):
        question_prompts(PromptEncoder(tokenizer, raw=True), "document", questions)


def test_past_the_positions():
    """With both numbers, and what to do."""
    check_length([[1] * 5], None)
    check_length([[1] * 5], 5)
    with pytest.raises(InputError, match=r"have 6 tokens, the model has 5 positions.*map-reduce"):
        check_length([[1] * 3, [1] * 6], 5)


@given(st.text("ab \n", max_size=600), st.integers(64, 200))
def test_parts_are_the_whole_document(document, room):
    """None is longer than there is room for, and nothing is left out."""
    parts = cut_document(document, room, len)
    assert all(len(part) <= room for part in parts)
    assert all(parts)
    kept = "".join(parts)
    assert document.startswith(kept)
    assert not document[len(kept) :].strip()


def test_parts_end_with_lines():
    """Where there is a line's end in the last half."""
    parts = cut_document("one line of words\n" * 40, 100, len)
    assert all(part.endswith("\n") for part in parts)
    assert part_texts(["x", "y"])[1] == "This is part 2 of 2 of a document.\n\ny"


def test_too_little_room_or_too_many_parts():
    """Refused before anything is computed."""
    with pytest.raises(InputError, match=r"need room for 64 tokens .* have 0"):
        cut_document("text", -5, len)
    with pytest.raises(InputError, match="more than 3 parts of 64 tokens"):
        cut_document("x" * 1000, 64, len, most_parts=3)
