"""What a model thinks, apart from what it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm_core.text.thoughts import FORMS, Thought, ThoughtParser, form_of

TAGS = FORMS[0]
ANSWERS = [  # begun by the prompt, the answer, thoughts, text
    (False, "<think>\nOne.\nTwo.\n</think>\n\nIt is 3.", "One.\nTwo.", "It is 3."),
    (True, "\nOne.\n</think>\n\nIt is 3.\n", "One.", "It is 3.\n"),
    (True, "</think>Yes", "", "Yes"),
    (False, "<think>\n\n</think>\n\nYes", "", "Yes"),
    (False, " \n<think>a</think>b", "a", "b"),
    (False, "Yes, <think>no</think>", "", "Yes, <think>no</think>"),  # what it quotes
    (False, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    (False, "<think>a < b </thin", "a < b </thin", ""),  # cut
    (False, "<thinking>", "", "<thinking>"),
    (False, "<thi", "", "<thi"),
    (False, " ", "", " "),
    (False, "", "", ""),
    (True, "", "", ""),
]


def taken(parser, answer, size):
    """Thoughts and text, in pieces of this size."""
    told = []
    for begin in range(0, len(answer), size):
        told += parser.add(answer[begin : begin + size])
    told += parser.finish()
    assert all(one.text if isinstance(one, Thought) else one for one in told)  # none is empty
    thoughts = "".join(one.text for one in told if isinstance(one, Thought))
    return thoughts, "".join(one for one in told if isinstance(one, str))


@pytest.mark.parametrize(("begun", "answer", "thoughts", "text"), ANSWERS)
def test_thoughts_are_apart_whole_and_letter_by_letter(begun, answer, thoughts, text):
    """In whatever pieces an answer comes."""
    for size in (len(answer) + 1, 3, 1):
        parser = ThoughtParser(TAGS, is_begun=begun)
        assert taken(parser, answer, size) == (thoughts, text), size


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<th", "</", " ", "\n", "a", "b"])),
    st.booleans(),
    st.integers(1, 5),
)
def test_pieces_change_nothing(parts, begun, size):
    """What is told is as of the whole answer."""
    answer = "".join(parts)
    if begun or answer.lstrip().startswith(TAGS.open):
        thought, _, text = (answer if begun else answer.lstrip()[len(TAGS.open) :]).partition(
            TAGS.close
        )
        expected = thought.strip(), text.lstrip()
    else:
        expected = "", answer
    assert taken(ThoughtParser(TAGS, is_begun=begun), answer, size) == expected


def test_a_thought_comes_before_it_ends():
    """All of it that cannot be its end."""
    parser = ThoughtParser(TAGS, is_begun=True)
    assert parser.add("Hello you") == [Thought("Hello you")]
    assert parser.add(" and </th") == [Thought(" and")]
    assert parser.add("e") == [Thought(" </the")]


def test_forms_are_known_by_templates():
    """By what ends a thought: templates take those of earlier answers away."""
    for form in FORMS:
        assert form_of(f"{{% if '{form.close}' in content %}}") == form
    assert form_of("{{ messages }}") is None
