"""The text of an answer: whole characters, and nothing of or after what ends it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm_core.errors import InputError
from ollm_core.serving.answer import Answer


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, token_ids, skip_special_tokens):
        """Their text."""
        return "".join(map(chr, token_ids))


def written(text, stops, *, include_stop=False):
    """What an answer gives, piece by piece, and what ended it."""
    answer = Answer(Letters(), dict.fromkeys(stops, include_stop))
    pieces = []
    for letter in text:
        pieces.append(answer.add(ord(letter)))
        if answer.stopped_by is not None:
            break
    return [*pieces, answer.finish()], answer.stopped_by


def test_what_may_begin_a_stop_text_is_held_back():
    """Until it is one, or cannot be one any more."""
    assert written("a<b<end>c", ["<end>"]) == (
        ["a", "", "<b", "", "", "", "", "", ""],
        "<end>",
    )
    assert written("a<en", ["<end>"]) == (["a", "", "", "", "<en"], None)


def test_the_first_of_several_stop_texts_ends_it():
    """By its place in the text; it is part of it only if it is to be."""
    answer = Answer(Letters(), {"two": True, "one": False})
    assert "".join(answer.add(ord(letter)) for letter in "a two one") == "a two"
    assert "".join(written("one two three", ["three", "two"])[0]) == "one "
    assert "".join(written("one two", ["two"], include_stop=True)[0]) == "one two"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_an_answer_is_the_text_before_the_first_stop(text, stops):
    """Whatever comes, letter by letter: the same as looking for stops after each letter."""
    expected, ended = text, False
    for end in range(1, len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            expected, ended = text[: min(found)], True
            break
    pieces, stopped_by = written(text, stops)
    assert "".join(pieces) == expected
    assert (stopped_by is not None) == ended


def test_without_a_tokenizer_there_is_no_text():
    """And none can be looked for."""
    answer = Answer(None, {})
    assert answer.add(5) + answer.finish() == ""
    with pytest.raises(InputError, match="need a tokenizer"):
        Answer(None, {"x": False})
