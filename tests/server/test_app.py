"""The application: its addresses, refusals in each protocol's form, its bounded queue, logs."""

from __future__ import annotations

import asyncio
import logging

import pytest
from asgi_calls import Call, call, calls

from ollm_core.server.app import open_app
from ollm_core.server_options import ServerOptions

CHAT = "/v1/chat/completions"
SECRET = "the word is swordfish"


def said(**more):
    """A body of a chat."""
    return {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2, **more}


def test_models_are_told(app):
    """The one that is there, with its positions."""
    listed, one, other = calls(app, ("/v1/models",), ("/v1/models/tiny",), ("/v1/models/gpt-4",))
    assert listed.fields() == {"object": "list", "data": [one.fields()]}
    assert (one.fields()["id"], one.fields()["max_model_len"]) == ("tiny", 256)
    assert (other.status, other.fields()["error"]["type"]) == (404, "not_found_error")


def test_health_and_metrics(app, service):
    """What a supervisor asks."""
    [health] = calls(app, ("/health",))
    assert (health.status, health.fields()) == (200, {"status": "ok"})
    calls(app, (CHAT, said()))
    [metrics] = calls(app, ("/metrics",))
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'ollm_requests_total{path="/v1/chat/completions",status="200"}' in metrics.data


@pytest.mark.parametrize(
    ("path", "body", "status", "is_ollama"),
    [
        ("/nowhere", None, 404, False), ("/api/nowhere", None, 404, True),
        (CHAT, None, 405, False), ("/api/chat", None, 405, True), ("/v1/models", {}, 405, False),
        (CHAT, b"{", 400, False), ("/api/chat", b"{", 400, True), ("/api/show", b"{", 400, True),
        (CHAT, b"x" * 100_001, 413, False),
    ],
)  # fmt: skip
def test_refusals_have_the_form_of_their_protocol(app, path, body, status, is_ollama):
    """An object in OpenAI's, a text in Ollama's."""
    [made] = calls(app, (path, body))
    assert made.status == status
    error = made.fields()["error"]
    assert isinstance(error if is_ollama else error["message"], str)


def test_the_queue_is_bounded(app, service, gate):
    """One more than there are places is told when to come again, at once and before its body is
    read.
    """

    async def run():
        gate.shut()
        waiting = [Call(app, CHAT, said(seed=n)) for n in range(12)]
        for one in waiting:
            await one.__aenter__()
        async with asyncio.timeout(30):
            while service.places.num_taken < 12:
                await asyncio.sleep(0.005)
        refused = await call(app, CHAT, b"no JSON")
        ollama = await call(app, "/api/chat", b"no JSON")
        gate.open()
        for one in waiting:
            await one.to_end()
        return refused, ollama, [one.status for one in waiting]

    refused, ollama, others = asyncio.run(run())
    assert (refused.status, ollama.status) == (429, 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.fields()["error"]["code"] == "too_many_requests"
    assert isinstance(ollama.fields()["error"], str)
    assert others == [200] * 12


def test_no_log_line_has_what_was_asked(app, model, caplog, monkeypatch):
    """Not when it is answered, not when it is refused, not when the server fails."""
    caplog.set_level(logging.DEBUG)
    calls(app, (CHAT, said()), (CHAT, {SECRET: 1}), (CHAT, said(stream=True)), (f"/{SECRET}",))

    def broken(*_):
        raise ZeroDivisionError(SECRET)

    with monkeypatch.context() as patch:
        patch.setattr("ollm_core.serving.openai.answers.Writer.body", broken)
        [made] = calls(app, (CHAT, said()))
    assert (made.status, made.fields()["error"]["message"]) == (500, "the server failed")
    assert "/v1/chat/completions: 200 after" in caplog.text
    assert "/v1/chat/completions: ZeroDivisionError" in caplog.text
    assert "swordfish" not in caplog.text


def test_other_sites_are_told_nothing_unless_allowed(service, app):
    """No CORS header without an allowed origin; a preflight is answered with one."""
    [made] = calls(app, ("/v1/models",))
    assert not any(name.startswith("access-control") for name in made.headers)
    options, before = ServerOptions(allowed_origins="https://a.example"), service.options
    service.options = options
    try:
        open_to = open_app(service)
    finally:
        service.options = before
    told = {"origin": "https://a.example"}
    [made] = calls(open_to, ("/v1/models",), headers=told)
    assert made.headers["access-control-allow-origin"] == "https://a.example"
    asked = {**told, "access-control-request-method": "POST"}
    [made] = calls(open_to, (CHAT,), headers=asked, method="OPTIONS")
    assert (made.status, made.headers["access-control-allow-methods"]) == (200, "GET, POST, DELETE")


def test_no_address_is_a_path(app):
    """What looks like one is nothing here."""
    for path in ("/../etc/passwd", "/v1/models/../../etc/passwd", "/%2e%2e/etc/passwd", "//x"):
        [made] = calls(app, (path,))
        assert made.status == 404
