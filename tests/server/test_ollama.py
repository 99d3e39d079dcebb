"""Ollama's addresses: what its clients read, streamed and whole."""

from __future__ import annotations

import asyncio
import json

import pytest
from asgi_calls import Call, calls

from ollm_core.server import ollama
from ollm_core.server.ollama import understood
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.text.templates import ChatTemplate

CHAT, TEXT = "/api/chat", "/api/generate"
PLAIN = ChatTemplate("{{ messages }}", "here", {})
GREEDY = {"temperature": 0, "num_predict": 6}


def lines(made):
    """Of an answer, each an object."""
    return [json.loads(line) for line in made.data.splitlines()]


def said(**more):
    """A body of a chat."""
    return {
        "model": "x",
        "messages": [{"role": "user", "content": "hello"}],
        "options": GREEDY,
        **more,
    }


def test_a_chat_is_streamed_and_whole_alike(app):
    """A line for each piece, the last with what it took; and as OpenAI's address answers."""
    stream, whole, other = calls(
        app,
        (CHAT, said()),
        (CHAT, said(stream=False)),
        (
            "/v1/chat/completions",
            {"messages": said()["messages"], "temperature": 0, "max_tokens": 6},
        ),
    )
    assert stream.headers["content-type"] == "application/x-ndjson"
    *parts, end = lines(stream)
    text = "".join(part["message"]["content"] for part in parts)
    assert text == whole.fields()["message"]["content"]
    assert text == other.fields()["choices"][0]["message"]["content"]
    assert {part["done"] for part in parts} == {False}
    for one in (end, whole.fields()):
        assert (one["done"], one["done_reason"], one["model"]) == (True, "length", "tiny")
        assert (one["prompt_eval_count"], one["eval_count"]) == (22, 6)
        assert one["total_duration"] >= one["eval_duration"] >= 0


def test_a_text_goes_on_raw_or_in_a_chat(app):
    """By /api/generate, whose prompt is a user's message unless it is raw."""
    body = {"model": "x", "prompt": "hello", "options": GREEDY, "stream": False}
    chat, raw, as_chat, as_text = calls(
        app,
        (TEXT, body),
        (TEXT, {**body, "raw": True}),
        (CHAT, said(stream=False)),
        ("/v1/completions", {"prompt": "hello", "temperature": 0, "max_tokens": 6}),
    )
    assert chat.fields()["response"] == as_chat.fields()["message"]["content"]
    assert raw.fields()["response"] == as_text.fields()["choices"][0]["text"]


def test_nothing_asked_says_that_the_model_is_there(app):
    """As clients do to have it loaded."""
    for made in calls(app, (TEXT, {"model": "x"}), (CHAT, {"model": "x", "messages": []})):
        assert (made.fields()["done"], made.fields()["done_reason"]) == (True, "load")


def test_clients_that_probe_find_what_they_look_for(app):
    """Version, tags, show and ps."""
    version, tags, show, ps = calls(
        app, ("/api/version",), ("/api/tags",), ("/api/show", {"model": "tiny"}), ("/api/ps",)
    )
    assert all(part.isdecimal() for part in version.fields()["version"].split("."))
    [listed], [running] = tags.fields()["models"], ps.fields()["models"]
    assert listed["name"] == running["model"] == "tiny"
    assert listed["size"] > 0
    assert len(listed["digest"]) == 64
    assert show.fields()["model_info"]["llama.context_length"] == 256
    assert show.fields()["capabilities"] == ["completion"]
    assert "messages" in show.fields()["template"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"think": True}, "think: the model's chat template knows of no thoughts"),
        ({"think": "much"}, "think: "),
        ({"format": "xml"}, "format: need 'json' or a schema"),
        ({"colour": 1}, "'colour' in the body is not known"),
        ({"stream": "yes"}, "stream: need true or false"),
        ({"options": []}, "options: need an object"),
        ({"options": {"colour": 1}}, "options: 'colour' is not known"),
        ({"options": {"num_predict": "x"}}, "num_predict: need a whole number"),
    ],
)
def test_what_is_not_supported_is_refused(body, message):
    """And not left out in silence."""
    with pytest.raises(RefusedError, match=message):
        understood("chat", body, PLAIN)


def test_options_have_their_names_in_openais_words():
    """Ollama's defaults hold where nothing is said; how it runs a model is nothing here."""
    options = {"repeat_penalty": 1.2, "stop": ["x"], "seed": 4, "num_ctx": 4096, "num_predict": -1}
    fields = understood("chat", {"options": options}, PLAIN).fields
    assert fields == {
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "stop": ["x"],
        "seed": 4, "messages": [],
    }  # fmt: skip


def test_wrong_values_are_told_in_ollamas_form(app):
    """A text, with a status, though a stream was asked for."""
    [made] = calls(app, (CHAT, said(options={"temperature": -1})))
    assert made.status == 400
    assert "temperature" in made.fields()["error"]


def test_a_slow_stream_is_kept_alive_and_leaving_it_cancels(app, service, gate, monkeypatch):
    """By parts without text, which clients take for nothing new."""
    monkeypatch.setattr(ollama, "KEEP_ALIVE_SECONDS", 0.02)

    async def run():
        gate.shut()
        async with Call(app, CHAT, said(options={"num_predict": 200, "seed": 9})) as one:
            async with asyncio.timeout(30):
                while len(one.data.splitlines()) < 4:
                    await asyncio.sleep(0.01)
            assert {part["message"]["content"] for part in lines(one)} == {""}
            one.leave()
            await one.to_end()
            assert service.places.num_taken == 0
        gate.open()
        async with asyncio.timeout(30):
            while service.session.num_running or service.session.num_waiting:
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_what_fails_in_a_stream_is_its_last_line(app, model, monkeypatch):
    """In Ollama's form."""
    from ollm_core.errors import ReadError

    def broken(*_):
        raise ReadError("the disk is gone")

    monkeypatch.setattr(model.engine, "run", broken)
    stream, whole = calls(app, (CHAT, said()), (CHAT, said(stream=False)))
    assert lines(stream)[-1] == {"error": "the disk is gone"}
    assert (whole.status, whole.fields()) == (500, {"error": "the disk is gone"})
