"""A server on real sockets: the official client, and clients that are slow, half gone or many."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from openai import APIStatusError, BadRequestError, OpenAI, RateLimitError
from running_server import Running

from ollm_core.errors import InputError
from ollm_core.server import listening
from ollm_core.server.errors import refusal, stopping
from ollm_core.server.listening import address_of, bound
from ollm_core.server_options import ServerOptions
from ollm_core.serving.session import SessionClosedError

LONG = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def running(service):
    """One over the module's service."""
    with Running(service) as server:
        yield server


@pytest.fixture
def client(running):
    """The official one."""
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def asked(client, text, **more):
    """The answer to a chat."""
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=6, **more
    )


def is_free(service) -> None:
    """Nothing of anybody is left, soon."""
    end = time.monotonic() + 20
    while service.places.num_taken or service.session.num_running or service.session.num_waiting:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_official_client_chats_and_streams(client):
    """Alike; with the usage, the models, and texts."""
    whole = asked(client, "hello")
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens == 6
    stream = [*asked(client, "hello", stream=True, stream_options={"include_usage": True})]
    assert "".join(one.choices[0].delta.content or "" for one in stream[:-1]) == text
    assert stream[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": stream[-1].usage.prompt_tokens_details}
    )
    assert [one.id for one in client.models.list()] == ["tiny"]
    echoed = client.completions.create(
        model="tiny", prompt="hello", echo=True, logprobs=1, max_tokens=0
    )
    assert echoed.choices[0].text == "hello"
    assert len(echoed.choices[0].logprobs.token_logprobs) == 5


def test_eight_official_clients_at_once(client):
    """Each gets what it gets alone."""
    texts = [f"question {n} " * (n + 1) for n in range(8)]
    alone = [asked(client, text).choices[0].message.content for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: asked(client, text), texts))
    assert [one.choices[0].message.content for one in together] == alone


def test_the_official_client_understands_refusals(client, service):
    """By their class and their field; a failure in a stream is raised there."""
    with pytest.raises(BadRequestError, match="temperature") as refused:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], temperature=-1
        )
    assert refused.value.param == "temperature"
    with ExitStack() as stack:
        for _ in range(service.places.number):
            stack.enter_context(service.places.taken())
        with pytest.raises(RateLimitError) as limited:
            asked(client, "hello")
    assert int(limited.value.response.headers["retry-after"]) >= 1
    with pytest.raises(APIStatusError) as gone:
        client.embeddings.create(model="tiny", input="x")
    assert gone.value.status_code == 404


def test_the_first_byte_of_a_stream_comes_at_once(running, service):
    """Also of the longest prompt that the model takes."""
    messages = [{"role": "user", "content": "y" * 230}]
    body = {"messages": messages, "stream": True, "max_tokens": 2}
    began = time.monotonic()
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as answer:
        first = next(answer.iter_raw())
        seconds = time.monotonic() - began
    assert first.startswith(b": ")
    assert seconds < 1


@pytest.mark.parametrize("how", ["closed", "half closed", "reset"])
def test_a_connection_that_goes_frees_its_place(running, service, how):
    """However it goes, in the middle of an answer."""
    connection = running.post("/v1/completions", {**LONG, "stream": True})
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    if how == "half closed":
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    elif how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    is_free(service)


def test_a_head_that_does_not_come_is_given_up(service, monkeypatch):
    """Nothing, or a part of it; a request that is there takes as long as it takes."""
    monkeypatch.setattr(listening.LimitedProtocol, "head_seconds", 0.3)
    with Running(service) as running:
        silent, slow, second = running.connect(), running.connect(), running.connect()
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""
        while not data.endswith(b'{"status":"ok"}'):
            data += second.recv(4096)
        second.sendall(b"GET /hea")
        for connection in (silent, slow, second):
            began = time.monotonic()
            assert connection.recv(4096) == b""
            assert time.monotonic() - began < 5
            connection.close()
        answered = running.post("/v1/completions", LONG)
        assert answered.recv(4096).startswith(b"HTTP/1.1 200")
        answered.close()


def test_one_connection_too_many_is_told(service):
    """And those that are there are served."""
    with Running(service, max_connections=3) as running:
        first = [running.connect() for _ in range(3)]
        for connection in first:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        more = running.connect()
        assert more.recv(4096).startswith(b"HTTP/1.1 503")
        for connection in (*first, more):
            connection.close()


def test_what_is_no_http_is_refused(running):
    """In one answer, and the server goes on."""
    connection = running.connect()
    connection.sendall(b"\x16\x03\x01\x00\x00hello\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 400")
    connection.close()
    large = running.connect()
    large.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000)
    assert b"400" in large.recv(4096).split(b"\r\n")[0]
    large.close()
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_body_of_100_mb_is_refused(running):
    """By its length, or while it comes; nothing of it is kept."""
    assert httpx.post(f"{running.url}/v1/completions", content=b"x" * 5_000_000).status_code == 413
    parts = (b"x" * 65536 for _ in range(1600))
    try:
        status = httpx.post(f"{running.url}/v1/completions", content=parts).status_code
    except httpx.TransportError:  # it was still sending when the connection was closed
        status = 413
    assert status == 413


def test_other_than_this_machine_needs_a_key():
    """Before a model is opened."""
    with pytest.raises(InputError, match="need an API key, have none"):
        bound(ServerOptions(host="0.0.0.0", port=0))
    with bound(ServerOptions(host="0.0.0.0", port=0, api_key="a-long-key")) as listener:
        assert address_of(listener).startswith("http://0.0.0.0:")


def test_a_port_that_is_taken_is_one_line():
    """With what to do."""
    with bound(ServerOptions(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port}: "):
            bound(ServerOptions(port=port))


def test_ipv6_has_brackets():
    """In its address."""
    try:
        listener = bound(ServerOptions(host="::1", port=0))
    except InputError:
        pytest.skip("this machine has no IPv6")
    with listener:
        assert address_of(listener).startswith("http://[::1]:")


def test_the_end_is_told_to_streams(model):
    """A server that is stopped breaks its answers off, and says so."""
    from ollm_core.server.service import Service

    with Service(model, "tiny") as service, Running(service) as running:
        running.listener._before_end = lambda: (service.close(), running.ended.append(True))
        connection = running.post("/v1/completions", {**LONG, "stream": True})
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        running.listener.should_exit = True
        data = b""
        while part := connection.recv(65536):
            data += part
        assert b"the server is being stopped" in data
        connection.close()


def test_what_the_end_of_a_session_breaks_off_has_one_name():
    """Whether it was cancelled first or not."""
    refused = refusal(SessionClosedError())
    assert (refused.status, refused.fields) == (503, stopping().fields)


@pytest.mark.soak
def test_a_soak_with_clients_that_come_and_go(running, service):
    """Two minutes of eight clients, half of whom leave early: answers stay the same, and nothing
    grows.
    """
    import random

    import psutil

    with OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        texts = [f"question {n}" for n in range(8)]
        alone = [asked(client, text).choices[0].message.content for text in texts]
        end, sizes = time.monotonic() + 120, []

        def use(number: int) -> int:
            chance, answered = random.Random(number), 0
            while time.monotonic() < end:
                if chance.random() < 0.5:
                    connection = running.post("/v1/completions", {**LONG, "stream": True})
                    connection.recv(chance.randrange(1, 4000))
                    connection.close()
                else:
                    found = asked(client, texts[number]).choices[0].message.content
                    assert found == alone[number]
                    answered += 1
                sizes.append(psutil.Process().memory_info().rss)
            return answered

        with ThreadPoolExecutor(8) as pool:
            answered = list(pool.map(use, range(8)))
    assert min(answered) > 10
    is_free(service)
    half = len(sizes) // 2
    assert max(sizes[half:]) < max(sizes[:half]) * 1.05
