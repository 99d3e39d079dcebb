"""What a model thinks, over HTTP: apart from what it says, in the form of each address."""

from __future__ import annotations

import json
import re

import pytest
from asgi_calls import calls
from calling_model import make_calling
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from thinking_model import THOUGHT, make_thinking

from ollm_core.api import load
from ollm_core.server.app import open_app
from ollm_core.server.service import Service
from ollm_core.serving.openai.requests import Defaults

CHAT, RESPONSES, OLLAMA = "/v1/chat/completions", "/v1/responses", "/api/chat"
HARMONY = (
    "{%- for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{%- for m in messages %}[{{ m.role }}]{{ m.content }}<|message|>{% endfor %}"
    "{%- if reasoning_effort %}{{ reasoning_effort }}{% endif %}[assistant]{# <|channel|> #}"
)
CHAIN = [
    "<|channel|>", "analysis", "<|message|>", THOUGHT, "<|end|>", "<|start|>",
    "assistant to=functions.look", "<|constrain|>", "json",
]  # fmt: skip
ASKED = [{"role": "user", "content": "1 + 2?"}]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Of a model that thinks, then says 3, whatever it is asked."""
    directory = make_thinking(tmp_path_factory.mktemp("models") / "thinking")
    with (
        load(directory, device="cpu") as model,
        Service(model, "thinking", None, Defaults(max_tokens=60)) as service,
    ):
        yield open_app(service)


def said(**more):
    """A body of a chat."""
    return {"model": "x", "messages": ASKED, "temperature": 0, **more}


def test_a_chat_has_its_thoughts_apart(app):
    """Whole and streamed; a completion has all that the model writes."""
    whole, stream = calls(app, (CHAT, said()), (CHAT, said(stream=True)))
    [choice] = ChatCompletion.model_validate(whole.fields()).choices
    assert choice.message.content == "It is 3."
    assert choice.message.reasoning_content == THOUGHT
    deltas = [event["choices"][0]["delta"] for event in stream.events()[:-1]]
    assert "".join(one.get("reasoning_content", "") for one in deltas) == THOUGHT
    assert "".join(one.get("content") or "" for one in deltas) == "It is 3."
    order = ["reasoning_content" in one for one in deltas if one.get("content") != ""]
    assert order.index(True) < order.index(False)


def test_thoughts_go_back_to_the_template(app):
    """By any of the names that clients have for them."""
    prompts = []
    for name in ("reasoning_content", "reasoning", "thinking"):
        turn = {"role": "assistant", "content": "3", name: "Hm."}
        [made] = calls(app, (CHAT, said(messages=[*ASKED, turn, *ASKED])))
        prompts.append(made.fields()["usage"]["prompt_tokens"])
    [without] = calls(
        app, (CHAT, said(messages=[*ASKED, {"role": "assistant", "content": "3"}, *ASKED]))
    )
    assert {*prompts} == {without.fields()["usage"]["prompt_tokens"] + len("Hm.") + 2}
    [refused] = calls(
        app, (CHAT, said(messages=[{"role": "assistant", "content": "3", "reasoning": 7}]))
    )
    assert refused.status == 400
    assert "reasoning: need text" in refused.fields()["error"]["message"]


def test_a_response_has_them_as_an_item(app):
    """With its events, and it may be sent back."""
    body = {"model": "x", "input": ASKED, "temperature": 0}
    whole, stream = calls(app, (RESPONSES, body), (RESPONSES, {**body, "stream": True}))
    made = Response.model_validate(whole.fields())
    assert [one.type for one in made.output] == ["reasoning", "message"]
    assert made.output[0].content[0].text == THOUGHT
    assert made.output_text == "It is 3."
    assert made.usage.output_tokens_details.reasoning_tokens > 0
    events = [json.loads(one) for one in re.findall(r"^data: (.*)$", stream.data.decode(), re.M)]
    kinds = [event["type"] for event in events]
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    deltas = [one["delta"] for one in events if one["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == THOUGHT
    assert [one["type"] for one in events[-1]["response"]["output"]] == ["reasoning", "message"]
    [again] = calls(app, (RESPONSES, {**body, "input": [*ASKED, *whole.fields()["output"]]}))
    assert again.status == 200, again.fields()
    grown = again.fields()["usage"]["input_tokens"] - made.usage.input_tokens
    assert grown == len("[assistant]Let me see.It is 3.") + 2


def test_one_that_is_cut_has_only_thoughts(app):
    """And says that it is not whole."""
    body = {"model": "x", "input": ASKED, "temperature": 0, "max_output_tokens": 2}
    response, chat = calls(app, (RESPONSES, body), (CHAT, said(max_tokens=2)))
    assert response.fields()["status"] == "incomplete"
    [thought] = response.fields()["output"]
    assert (thought["type"], thought["status"]) == ("reasoning", "incomplete")
    [choice] = chat.fields()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert choice["message"]["reasoning_content"] == THOUGHT


def test_ollama_calls_it_thinking(app):
    """Streamed and whole; whether the model is to, its template is told."""
    body = {"model": "x", "messages": ASKED, "options": {"temperature": 0}}
    whole, plain, stream = calls(
        app,
        (OLLAMA, {**body, "stream": False, "think": True}),
        (OLLAMA, {**body, "stream": False, "think": False}),
        (OLLAMA, body),
    )
    message = whole.fields()["message"]
    assert (message["thinking"], message["content"]) == (THOUGHT, "It is 3.")
    told = plain.fields()["prompt_eval_count"] - whole.fields()["prompt_eval_count"]
    assert told == len("[plain]")
    parts = [json.loads(line)["message"] for line in stream.data.splitlines()]
    assert "".join(one.get("thinking", "") for one in parts) == THOUGHT
    assert "".join(one["content"] for one in parts) == "It is 3."
    [shown] = calls(app, ("/api/show", {"model": "x"}))
    assert "thinking" in shown.fields()["capabilities"]
    [generated] = calls(app, ("/api/generate", {"model": "x", "prompt": "1 + 2?", "stream": False}))
    assert generated.fields()["thinking"] == THOUGHT


def test_an_answer_under_a_schema_has_none(app):
    """It follows it from its first token on."""
    wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes"]}}}
    [made] = calls(app, (CHAT, said(response_format=wanted)))
    [choice] = made.fields()["choices"]
    assert choice["message"]["content"] == '"yes"'
    assert "reasoning_content" not in choice["message"]


def test_gpt_oss_thinks_and_calls_on_channels(tmp_path):
    """Its control tokens are no text, and a call is one."""
    directory = make_calling(tmp_path / "harmony", CHAIN, HARMONY)
    with (
        load(directory, device="cpu") as model,
        Service(model, "harmony", None, Defaults(max_tokens=9)) as service,
    ):
        tools = [{"type": "function", "function": {"name": "look"}}]
        app = open_app(service)
        [plain, offered] = calls(
            app,
            (CHAT, said(reasoning_effort="low", max_tokens=5)),
            (CHAT, said(tools=tools, tool_choice="auto")),
        )
        [choice] = plain.fields()["choices"]
        assert choice["message"]["reasoning_content"] == THOUGHT
        assert choice["message"]["content"] == ""
        assert offered.status == 200, offered.fields()
        assert offered.fields()["choices"][0]["message"]["reasoning_content"] == THOUGHT
