"""Who may ask: names, pages and keys."""

from __future__ import annotations

import pytest
from asgi_calls import calls

from ollm_core.server.guard import Guard, is_loopback

KEY = "a-long-key"


async def greeting(scope, receive, send):
    """An application that says its path."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def status(headers, path="/v1/models", **how):
    """What a request with these headers is answered."""
    guard = Guard(greeting, **{"hosts": ["box.lan"], "origins": [], "api_key": None, **how})
    [made] = calls(guard, (path,), headers=headers)
    return made.status


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:8000", 200), ("LOCALHOST", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200),
        ("192.168.0.7", 200), ("box.lan:8000", 200), ("evil.example", 403), ("", 403),
        ("localhost.evil.example", 403), ("localhost@evil.example", 403), ("evil/localhost", 403),
        ("localhost:port", 403), ("xbox.lan", 403),
    ],
)  # fmt: skip
def test_a_name_must_be_the_servers(host, expected):
    """An address is no name; a page of anybody's may have its own name lead here."""
    assert status({"host": host}) == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8000", 200), ("https://localhost:8000", 200), ("null", 403),
        ("https://evil.example", 403), ("http://localhost:9000", 403), ("https://a.example", 200),
    ],
)  # fmt: skip
def test_pages_of_others_are_refused(origin, expected):
    """Before anything is computed for them: browsers send them without asking."""
    headers = {"host": "localhost:8000", "origin": origin}
    assert status(headers, origins=["https://a.example"]) == expected


def test_any_origin_may_be_allowed():
    """By *."""
    assert status({"origin": "https://b.example"}, origins=["*"], api_key=None) == 200


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f"Bearer {KEY}", 200), (f"bearer  {KEY}", 200), (KEY, 401), (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401), ("Bearer ", 401), ("Bearer \xff", 401), (None, 401),
    ],
)  # fmt: skip
def test_a_key_is_asked_for(given, expected):
    """By every page but that which says that the server is there."""
    headers = {} if given is None else {"authorization": given}
    assert status(headers, api_key=KEY) == expected
    assert status(headers, "/health", api_key=KEY) == 200


def test_what_fails_behind_it_is_told_by_its_type_alone(caplog):
    """The words of an error may be a client's."""

    async def broken(*_):
        raise ValueError("a secret")

    calls(Guard(broken, hosts=[], origins=[], api_key=None), ("/",))
    assert caplog.messages == ["ValueError"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback(host, expected):
    """Only this machine reaches it."""
    assert is_loopback(host) is expected
