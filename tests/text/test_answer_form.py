"""Thoughts and calls in one answer, by the chat template."""

from __future__ import annotations

from dataclasses import replace

from ollm_core.text.answer_form import AnswerForm, Said
from ollm_core.text.thoughts import Thought

BOTH = "{% if '</think>' in content %}<tool_call>"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


def test_a_model_thinks_then_speaks_then_calls():
    """Each is told apart; what it thinks of calling is not called."""
    said = Said(replace(AnswerForm.of(BOTH), tools=TOOLS))
    pieces = said.add(f"<think>\n{CALL}?\n</think>\nYes.\n{CALL}", last=True)
    assert [type(one).__name__ for one in pieces] == ["Thought", "str", "Call"]
    assert (said.thoughts, said.text) == (f"{CALL}?", "Yes.")
    assert [one.name for one in said.calls] == ["look"]


def test_without_functions_a_call_is_text():
    """And thoughts are thoughts."""
    said = Said(AnswerForm.of(BOTH))
    assert said.add("<think>a</think>" + CALL, last=True) == [Thought("a"), CALL]


def test_a_prompt_may_have_begun_the_thought():
    """Then an answer under a grammar begins after its end, which is written for the model."""
    begun = AnswerForm.of(BOTH, "<|assistant|><think>\n")
    assert begun.is_begun
    assert begun.opening == "\n</think>\n\n"
    assert Said(begun).add("a</think>b", last=True) == [Thought("a"), "b"]
    closed = AnswerForm.of(BOTH, "<think>\n\n</think>\n\n")
    assert not closed.is_begun
    assert closed.opening == ""
    bound = replace(begun, is_bound=True)
    assert Said(bound).add("<think>", last=True) == ["<think>"]
    assert bound.control == ()


def test_what_may_be_control_tokens():
    """The marks of what is looked for, and no others."""
    plain = AnswerForm.of(BOTH)
    assert plain.control == ("<think>", "</think>")
    assert {"<tool_call>", "</tool_call>"} < {*replace(plain, tools=TOOLS).control}
    assert AnswerForm.of("{{ messages }}").control == ()
    assert not AnswerForm.of("{{ messages }}").has_thoughts
