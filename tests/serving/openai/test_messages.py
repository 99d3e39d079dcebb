"""Messages of a chat: texts, calls, and what these gave."""

from __future__ import annotations

import pytest

from ollm_core.serving.openai.messages import name_results, read_message
from ollm_core.serving.openai.refused import RefusedError

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_a_text_may_come_in_parts():
    """And is one."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_message(0, {"role": "user", "content": parts}) == {"role": "user", "content": "ab"}


def test_arguments_of_a_call_are_an_object():
    """As chat templates want them; a client sends them as text. There may be no text beside."""
    made = read_message(0, {"role": "assistant", "content": None, "tool_calls": [CALL]})
    assert made["content"] == ""
    assert made["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    gave = {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "2"}
    assert read_message(0, gave) == gave


def test_what_a_function_gave_has_its_name():
    """By the call that it is of; a name that was said stays, and an id of nobody has none."""
    gave = [{"role": "tool", "tool_call_id": one, "content": ""} for one in ("c1", "c2", "c1")]
    gave[2]["name"] = "g"
    said = [{"role": "assistant", "tool_calls": [CALL]}, *gave]
    messages = [read_message(number, one) for number, one in enumerate(said)]
    name_results(messages)
    assert [one.get("name") for one in messages[1:]] == ["f", None, "g"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "tool_calls": {"a": 1}},
        {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "\ud800", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{**CALL, "id": 3}]},
        {"role": "tool", "content": "x", "tool_call_id": "y" * 513},
        {"role": "tool", "content": None},
    ],
)
def test_what_is_none_is_refused(message):
    """With its place."""
    with pytest.raises(RefusedError) as refused:
        read_message(2, message)
    assert refused.value.param == "messages[2]"
