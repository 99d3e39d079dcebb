"""Answers of gpt-oss: messages on channels."""

from __future__ import annotations

import json

import pytest

from ollm_core.text.answer_form import AnswerForm, Said
from ollm_core.text.harmony import OPENING

TEMPLATE = "<|start|>{{ role }}<|channel|>final<|message|>"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
CALL = "commentary to=functions.look <|constrain|>json<|message|>"
ANSWERS = [  # the answer; thoughts, text, calls
    (f"{ANALYSIS}One. Two.<|end|>{FINAL}It is 3.<|return|>", "One. Two.", "It is 3.", []),
    (f"{ANALYSIS}One.<|end|>{FINAL}It is\n 3.", "One.", "It is\n 3.", []),
    (
        f'{ANALYSIS}Look.<|end|><|start|>assistant<|channel|>{CALL}{{"a": [1, "é"]}}<|call|>',
        "Look.", "", [("look", {"a": [1, "é"]})],
    ),
    (
        ' to=functions.look<|channel|>commentary json<|message|>{"a": 2}',
        "", "", [("look", {"a": 2})],
    ),
    (
        "<|channel|>commentary<|message|>I look.<|end|>"
        f'<|start|>assistant<|channel|>{CALL}{{}}<|call|>',
        "", "I look.", [("look", {})],
    ),
    (
        f"<|channel|>commentary<|message|>First.<|end|>{ANALYSIS}a<|end|>{FINAL}Second.",
        "a", "First.\n\nSecond.", [],
    ),
    (f"<|channel|>{CALL}{{no}}<|call|>", "", "{no}", []),
    (
        "<|channel|>commentary to=functions.other<|message|>{}<|call|>",
        "", "{}", [],
    ),
    (f"{ANALYSIS}a < b <|en", "a < b <|en", "", []),  # cut
    ("<|channel|>anal", "", "", []),
    ("Plain <|text", "", "Plain <|text", []),
    ("<|chan", "", "<|chan", []),
    ("", "", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "thoughts", "text", "calls"), ANSWERS)
def test_channels_are_apart_whole_and_letter_by_letter(answer, thoughts, text, calls):
    """In whatever pieces an answer comes."""
    for size in (len(answer) + 1, 5, 1):
        said = Said(AnswerForm(calls=AnswerForm.of(TEMPLATE).calls, tools=TOOLS))
        for begin in range(0, len(answer), size):
            said.add(answer[begin : begin + size])
        said.add("", last=True)
        found = [(one.name, json.loads(one.arguments)) for one in said.calls]
        assert (said.thoughts, said.text, found) == (thoughts, text, calls), size


def test_what_is_said_comes_before_its_end():
    """Thoughts and text alike."""
    said = Said(AnswerForm.of(TEMPLATE))
    assert [one.text for one in said.add(f"{ANALYSIS}Hello y")] == ["Hello y"]
    assert [one.text for one in said.add("ou<|e")] == ["ou"]
    assert said.add(f"nd|>{FINAL}Yes") == ["Yes"]


def test_an_answer_that_begins_at_once_is_text():
    """Where the opening is written for the model, its form says so."""
    form = AnswerForm.of(TEMPLATE)
    assert form.opening == OPENING
    assert form.has_thoughts
    said = Said(form)
    said.add('{"a": 1}', last=True)
    assert (said.text, said.thoughts) == ('{"a": 1}', "")
