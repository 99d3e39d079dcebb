"""OpenAI's responses: the answers of chat in another form, whole and in events."""

from __future__ import annotations

import json

import pytest
from asgi_calls import calls
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ollm_core.errors import ReadError
from ollm_core.server.response_bodies import understood
from ollm_core.serving.openai.refused import RefusedError

PATH = "/v1/responses"
BODY = {"model": "x", "input": "hello", "max_output_tokens": 6, "temperature": 0}


def events(made):
    """Each as the official client reads it."""
    adapter = TypeAdapter(ResponseStreamEvent)
    told = [one for one in made.data.decode().split("\n\n") if one.startswith("event: ")]
    found = []
    for one in told:
        kind, data = one.removeprefix("event: ").split("\ndata: ")
        found.append(adapter.validate_python(json.loads(data)))
        assert found[-1].type == kind
    assert [one.sequence_number for one in found] == list(range(len(found)))
    return found


def test_a_response_is_the_answer_of_a_chat(app):
    """As the official client's types have it, with what it took and why it ended."""
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
    made, other = calls(app, (PATH, BODY), ("/v1/chat/completions", chat))
    found = Response.model_validate(made.fields())
    assert found.output_text == other.fields()["choices"][0]["message"]["content"]
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (found.usage.input_tokens, found.usage.output_tokens) == (22, 6)
    assert (found.model, found.max_output_tokens) == ("tiny", 6)


def test_a_stream_has_the_events_of_its_client(app):
    """In their order; the pieces come to the text, and the last has all of it."""
    stream, whole = calls(app, (PATH, {**BODY, "stream": True}), (PATH, BODY))
    assert stream.data.startswith(b': {"state":"received"}')
    found = events(stream)
    text = Response.model_validate(whole.fields()).output_text
    kinds = [one.type for one in found]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    deltas = [one.delta for one in found if one.type == "response.output_text.delta"]
    assert "".join(deltas) == found[-4].text == found[-1].response.output_text == text
    assert len(deltas) > 1


def test_turns_and_instructions_are_a_chat(app):
    """In their order, with the instructions first."""
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "id": "m", "status": "completed",
         "content": [{"type": "output_text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
    chat = understood({"input": turns, "instructions": "be brief", "max_output_tokens": 3})
    assert chat["messages"][0] == {"role": "system", "content": "be brief"}
    assert [one["role"] for one in chat["messages"][1:]] == ["user", "assistant", "user"]
    assert chat["max_completion_tokens"] == 3
    [made] = calls(app, (PATH, {"input": turns, "max_output_tokens": 1}))
    assert made.fields()["usage"]["input_tokens"] == len("[user]a[assistant]b[user]c[assistant]")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "colour": 1}]}, "input[0]"),
        ({"reasoning": {"effort": [3]}}, "reasoning"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "function_call", "colour": 1}]}, "input[0]"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"text": "x"}, "text"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_is_not_supported_is_refused(fields, param):
    """With the field's name."""
    with pytest.raises(RefusedError) as refused:
        understood({"input": "x", **fields})
    assert refused.value.param == param


def test_a_format_is_that_of_chats(app):
    """Under another name."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert understood({"input": "x", "text": wanted})["response_format"] == {
        "type": "json_schema", "json_schema": {"schema": schema},
    }  # fmt: skip
    assert "response_format" not in understood({"input": "x", "text": {"format": {"type": "text"}}})


def test_wrong_values_have_a_status(app):
    """In OpenAI's form, though a stream was asked for."""
    [made] = calls(app, (PATH, {**BODY, "temperature": -1, "stream": True}))
    assert (made.status, made.fields()["error"]["param"]) == (400, "temperature")


def test_what_fails_in_a_stream_is_an_event(app, model, monkeypatch):
    """Of its own kind."""

    def broken(*_):
        raise ReadError("the disk is gone")

    monkeypatch.setattr(model.engine, "run", broken)
    [made] = calls(app, (PATH, {**BODY, "stream": True}))
    [last] = events(made)
    assert (last.type, last.message) == ("error", "the disk is gone")
