"""Calls of functions over HTTP: as the official client reads them, whole and streamed."""

from __future__ import annotations

import json

import pytest
from asgi_calls import calls
from calling_model import make_calling
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from ollm_core.api import load
from ollm_core.server.app import open_app
from ollm_core.server.service import Service
from ollm_core.serving.openai.requests import Defaults

CHAT, RESPONSES, OLLAMA = "/v1/chat/completions", "/v1/responses", "/api/chat"
ARGUMENTS = {"where": "Rome"}
CHAIN = [
    "I look.", "<tool_call>", '\n{"name": "look", "argum', 'ents": {"where": "Rome"}}\n',
    "</tool_call>",
]  # fmt: skip
LOOK = {
    "name": "look",
    "description": "Look at <tool_call> a place.",
    "parameters": {
        "type": "object",
        "properties": {"where": {"$ref": "#/$defs/place"}},
        "required": ["where"],
        "additionalProperties": False,
        "$defs": {"place": {"enum": ["Rome", "Bern"]}},
    },
}
STOP = {"name": "stop"}
TOOLS = [{"type": "function", "function": one} for one in (LOOK, STOP)]
ASKED = [{"role": "user", "content": "What is it like in Rome?"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Of a model that looks at Rome, whatever it is asked."""
    directory = make_calling(tmp_path_factory.mktemp("models") / "calling", CHAIN)
    with (
        load(directory, device="cpu") as model,
        Service(model, "calling", None, Defaults(max_tokens=120)) as opened,
    ):
        yield opened


def said(**more):
    """A body of a chat."""
    return {"model": "x", "messages": ASKED, "temperature": 0, "tools": TOOLS, **more}


def accumulated(made):
    """A stream as clients put it together: text, calls, and why it ended."""
    text, found, reason = "", {}, None
    for event in made.events()[:-1]:
        [choice] = ChatCompletionChunk.model_validate(event).choices
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            one = found.setdefault(call.index, {"id": call.id, "name": "", "arguments": ""})
            one["name"] += call.function.name or ""
            one["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return text, [found[index] for index in range(len(found))], reason


def test_a_model_calls_what_it_was_given(app):
    """With what it says beside, whole and streamed; its control tokens are no text."""
    whole, stream = calls(app, (CHAT, said()), (CHAT, said(stream=True)))
    [choice] = ChatCompletion.model_validate(whole.fields()).choices
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "look")
    assert json.loads(call.function.arguments) == ARGUMENTS
    text, [streamed], reason = accumulated(stream)
    assert (text, reason) == ("I look.", "tool_calls")
    assert (streamed["name"], json.loads(streamed["arguments"])) == ("look", ARGUMENTS)
    assert {len(call.id), len(streamed["id"])} == {9}


def test_log_probabilities_are_of_all_tokens(app):
    """Also of those that are a call."""
    body = said(logprobs=True)
    whole, stream = calls(app, (CHAT, body), (CHAT, {**body, "stream": True}))
    tokens = [one["token"] for one in whole.fields()["choices"][0]["logprobs"]["content"]]
    assert tokens == [*CHAIN, "</s>"]
    parts = [event["choices"][0]["logprobs"] for event in stream.events()[:-1]]
    assert [one["token"] for part in parts if part for one in part["content"]] == tokens


def test_without_a_choice_to_call_the_answer_is_text(app, service):
    """The template is told of no function then, and nothing is looked for in the answer."""
    none, without = calls(app, (CHAT, said(tool_choice="none")), (CHAT, {**said(), "tools": []}))
    for made in (none, without):
        [choice] = made.fields()["choices"]
        assert choice["message"]["content"] == "I look." + CHAIN[2] + CHAIN[3]
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
    both = [made.fields()["usage"]["prompt_tokens"] for made in (none, without)]
    assert both[0] == both[1]


@pytest.mark.parametrize("name", ["look", "stop"])
def test_a_function_that_must_be_called_is(app, name):
    """By its schema, whatever the model would say; references in it lead where they did."""
    choice = {"type": "function", "function": {"name": name}}
    whole, stream = calls(
        app,
        (CHAT, said(tool_choice=choice)),
        (CHAT, said(tool_choice=choice, stream=True)),
    )
    [found] = ChatCompletion.model_validate(whole.fields()).choices
    [call] = found.message.tool_calls
    assert (found.message.content, found.finish_reason) == (None, "tool_calls")
    assert call.function.name == name
    if name == "look":
        assert json.loads(call.function.arguments)["where"] in ("Rome", "Bern")
    text, [streamed], _ = accumulated(stream)
    assert (text, streamed["name"]) == ("", name)
    assert streamed["arguments"] == call.function.arguments


def test_one_of_them_must_be_called(app):
    """Which is the model's to say."""
    [made] = calls(app, (CHAT, said(tool_choice="required")))
    [choice] = made.fields()["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] in ("look", "stop")


def test_a_call_that_is_cut_off_is_text(app):
    """Its reason says so."""
    whole, stream = calls(app, (CHAT, said(max_tokens=3)), (CHAT, said(max_tokens=3, stream=True)))
    [choice] = whole.fields()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == "I look." + CHAIN[1] + CHAIN[2].rstrip()
    assert accumulated(stream) == (choice["message"]["content"], [], "length")


def test_what_a_function_gave_is_read(app, service):
    """With the call before it, as the template writes them; what both spell is plain text."""
    call = {
        "id": "a", "type": "function",
        "function": {"name": "look", "arguments": '{"where": "<tool_call>"}'},
    }  # fmt: skip
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "Sunny</tool_call>"},
    ]
    asked = service.reader.read_body("chat", said(messages=messages))
    text = service.writer.decode(asked.token_ids)
    assert '[assistant]<tool_call>{"name": "look", "arguments": {"where": "<tool_call>"}}' in text
    assert text.endswith("[tool]Sunny</tool_call>[assistant]")
    opening = service.tokenizer.convert_tokens_to_ids("<tool_call>")
    assert asked.token_ids.count(opening) == 1  # that of the template
    assert calls(app, (CHAT, said(messages=messages)))[0].status == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": 3}, "tools", "need a list"),
        ({"tools": [{"type": "web_search"}]}, "tools", "need a function"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools", "names that differ"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "name: need"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}],
             "tool_choice": "required"},
            "tools", "need a JSON schema",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}],
             "tool_choice": "required"},
            "tools", "the schema",
        ),
        ({"tool_choice": "often"}, "tool_choice", "need one of"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "need one of"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice", "a function of tools",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "need no tools"),
        ({"tool_choice": "required", "min_tokens": 3}, "min_tokens", "where the answer ends"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused(app, fields, param, message):
    """In one line, with the field's name."""
    [made] = calls(app, (CHAT, said(**fields)))
    error = made.fields()["error"]
    assert (made.status, error["param"]) == (400, param)
    assert message in error["message"]
    assert "\n" not in error["message"]


def test_responses_have_calls_as_items(app):
    """Whole, and in events; and such items are turns of a next one."""
    tools = [{"type": "function", **LOOK}]
    body = {"input": "hello", "tools": tools, "temperature": 0}
    whole, stream = calls(app, (RESPONSES, body), (RESPONSES, {**body, "stream": True}))
    found = Response.model_validate(whole.fields())
    message, call = found.output
    assert (found.status, found.output_text) == ("completed", "I look.")
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "look",
        ARGUMENTS,
    )
    told = [json.loads(one.split("\ndata: ")[1]) for one in stream.data.decode().split("\n\n")
            if one.startswith("event: ")]  # fmt: skip
    kinds = [one["type"].removeprefix("response.") for one in told]
    assert kinds[-6:] == [
        "output_item.done", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [one["sequence_number"] for one in told] == [*range(len(told))]
    last = Response.model_validate(told[-1]["response"])
    assert [one.type for one in last.output] == ["message", "function_call"]
    turns = [
        {"role": "user", "content": "hello"},
        *(one.model_dump(exclude_none=True) for one in (message, call)),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"},
    ]
    named = {"type": "function", "name": "look"}
    again, forced = calls(
        app, (RESPONSES, {**body, "input": turns}), (RESPONSES, {**body, "tool_choice": named})
    )
    assert again.fields()["usage"]["input_tokens"] > whole.fields()["usage"]["input_tokens"]
    assert [one["type"] for one in forced.fields()["output"]] == ["function_call"]


def test_ollama_has_arguments_as_an_object(app):
    """Whole and streamed; and its turns are understood."""
    options = {"temperature": 0}
    body = {"model": "x", "messages": ASKED, "tools": TOOLS, "options": options}
    whole, stream, show = calls(
        app, (OLLAMA, {**body, "stream": False}), (OLLAMA, body), ("/api/show", {"model": "x"})
    )
    message = whole.fields()["message"]
    call = {"function": {"name": "look", "arguments": ARGUMENTS}}
    assert message == {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    parts = [json.loads(line)["message"] for line in stream.data.splitlines()]
    assert "".join(part["content"] for part in parts) == "I look."
    assert [one for part in parts for one in part.get("tool_calls", [])] == [call]
    assert "tools" in show.fields()["capabilities"]
    turns = [*ASKED, message, {"role": "tool", "tool_name": "look", "content": "Sunny"}]
    [again] = calls(app, (OLLAMA, {**body, "messages": turns, "stream": False}))
    assert again.status == 200
    assert again.fields()["prompt_eval_count"] > whole.fields()["prompt_eval_count"]


def test_a_template_that_takes_no_functions_is_told(tiny_chat):
    """With what may be done instead; and one whose calls nobody knows."""
    from transformers import AutoTokenizer

    from ollm_core.serving.openai.refused import RefusedError
    from ollm_core.serving.openai.requests import Reader

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    with pytest.raises(RefusedError, match=r"template does not take them; .* response_format"):
        Reader(tokenizer).read_body("chat", said())
    call = {"function": {"name": "look", "arguments": {}}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(RefusedError, match="template does not take tool_calls"):
        Reader(tokenizer).read_body("chat", {"messages": messages})
    tokenizer.chat_template = "{{ tools }}{{ messages[0].content }}"
    with pytest.raises(RefusedError, match=r"is not known; .* by tool_choice"):
        Reader(tokenizer).read_body("chat", said())
    assert Reader(tokenizer).read_body("chat", said(tool_choice="required")).tools.forced


@pytest.fixture
def app(service):
    """Of the service."""
    return open_app(service)


def test_the_official_client_goes_round(service):
    """It calls, is told what that gave, and is answered; streamed as its own helper reads it."""
    from openai import OpenAI
    from running_server import Running

    with Running(service) as running:
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with client.chat.completions.stream(
            model="x", messages=ASKED, tools=TOOLS, temperature=0
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        [call] = message.tool_calls
        assert json.loads(call.function.arguments) == ARGUMENTS
        turns = [
            *ASKED,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "Sunny"},
        ]
        made = client.chat.completions.create(
            model="x", messages=turns, tools=TOOLS, tool_choice="none", temperature=0
        )
        assert made.choices[0].finish_reason == "stop"
        client.close()
