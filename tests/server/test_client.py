"""One client: limits on what it sends, whether it is there, and how long it may take nothing."""

from __future__ import annotations

import asyncio

import pytest
from asgi_calls import Call, call, calls

from ollm_core.server import client as module
from ollm_core.server.client import Client
from ollm_core.server.errors import ClientGoneError, RefusedRequestError


def reader(most=1000):
    """An application that reads an object and says how many names it has."""

    async def app(scope, receive, send):
        async with Client(scope, receive, send) as client:
            try:
                fields = await client.read_object(most)
            except RefusedRequestError as refused:
                await client.tell(refused.status, refused.fields, refused.headers)
            else:
                await client.tell(200, {"number": len(fields)})

    return app


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"a": 1}', 200, None),
        ([b'{"a"', b": 1", b"}"], 200, None),
        (b"", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'{"a": 1, "a": 2}', 400, "invalid_json"),
        (b'{"a": NaN}', 400, "invalid_json"),
        (b'{"a": "\xff"}', 400, "invalid_json"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", 400, "invalid_json"),
        (b"[" * 999, 400, "invalid_json"),
        (b"x" * 1001, 413, "request_too_large"),
        ([b"x" * 600, b"y" * 600], 413, "request_too_large"),
    ],
)
def test_a_body_is_a_json_object_within_limits(body, status, code):
    """And anything else is refused in one line."""
    [made] = calls(reader(), ("/", body))
    assert made.status == status
    if code is not None:
        assert made.fields()["error"]["code"] == code
        assert made.headers["content-length"] == str(len(made.data))


def test_a_megabyte_of_brackets():
    """Is refused like others, parsed beside the loop."""
    [made] = calls(reader(2 << 20), ("/", b'{"a":' + b"[" * (1 << 20)))
    assert made.fields()["error"]["message"].endswith("nested too deeply")


def test_a_length_that_is_too_large_is_refused_before_the_body():
    """Nothing of it is read but what is thrown away, so that the client can see why."""

    async def run():
        headers = {"content-length": "100000000"}
        async with Call(reader(), "/", [b"x" * 500_000] * 50, headers=headers) as made:
            await made.to_end()
            assert (made.status, made.headers["connection"]) == (413, "close")
            assert len(made._parts) == 47

    asyncio.run(run())


def test_a_slow_body_is_given_up(monkeypatch):
    """With 408, though parts of it still come."""
    monkeypatch.setattr(module, "READ_SECONDS", 0.05)
    monkeypatch.setattr(module, "_DRAIN_SECONDS", 0.05)
    [made] = calls(reader(), ("/", [b'{"a"', None, b": 1}"]))
    assert (made.status, made.headers["connection"]) == (408, "close")


def test_work_ends_with_its_client():
    """What is waited for is cancelled; what fails at that moment is nobody's."""
    ended = []

    async def app(scope, receive, send):
        async with Client(scope, receive, send) as client:
            await client.read_object(1000)
            assert await client.unless_gone(asyncio.sleep(0, "done")) == "done"
            with pytest.raises(KeyError):
                await client.unless_gone(failing())
            await client.start(200, "text/plain")
            try:
                await client.unless_gone(asyncio.sleep(100))
            except ClientGoneError:
                ended.append(True)
            with pytest.raises(ClientGoneError):
                await client.write(b"more")

    async def failing():
        raise KeyError

    async def run():
        async with Call(app, "/", {}) as made:
            while not made.status:
                await asyncio.sleep(0.001)

    asyncio.run(run())
    assert ended == [True]


def test_who_takes_nothing_is_gone(monkeypatch):
    """After a while; its place is not held for ever."""
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.05)
    gone = []

    async def app(scope, receive, send):
        async def never(message):
            if message["type"] == "http.response.body":
                await asyncio.sleep(100)

        async with Client(scope, receive, never) as client:
            await client.read_object(1000)
            await client.start(200, "text/plain")
            with pytest.raises(ClientGoneError):
                await client.write(b"more")
            gone.append(True)

    asyncio.run(call(app, "/", {}))
    assert gone == [True]
