"""Calls an ASGI application without a network, byte by byte where that matters."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class Call:
    """One HTTP request. Use it in an `async with`, whose end goes away if nothing else has."""

    def __init__(
        self,
        app: Any,
        path: str,
        body: Any = None,
        method: str = "",
        headers: dict[str, str] | None = None,
        query: bytes = b"",
    ) -> None:
        """`body` is bytes, parts of them (None: no more come), an object for JSON, or None: a
        GET.
        """
        if body is not None and not isinstance(body, bytes | list):
            body = json.dumps(body).encode()
        self._parts = body if isinstance(body, list) else [body or b""]
        told = {"host": "localhost", **(headers or {})}
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "path": path,
            "raw_path": path.encode(), "root_path": "", "query_string": query, "scheme": "http",
            "method": method or ("GET" if body is None else "POST"),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in told.items()],
        }  # fmt: skip
        self._app = app
        self._left = asyncio.Event()
        self._changed = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.data = b""
        self.is_whole = False

    async def __aenter__(self) -> Call:
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        self.task.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()
        await self.task

    def leave(self) -> None:
        """The client goes away."""
        self._left.set()

    async def until(self, words: bytes) -> None:
        """Until the answer has these."""
        async with asyncio.timeout(60):
            while words not in self.data:
                assert not self.task.done(), (self.status, self.data)
                self._changed.clear()
                await self._changed.wait()

    async def to_end(self) -> Call:
        """Until the application is done."""
        async with asyncio.timeout(120):
            await asyncio.wait({self.task})
        return self

    def fields(self) -> Any:
        """The answer, of JSON."""
        return json.loads(self.data)

    def events(self) -> list[Any]:
        """The data of server-sent events; [DONE] as it is."""
        lines = [line for line in self.data.decode().split("\n\n") if line.startswith("data: ")]
        return [
            one if one == "[DONE]" else json.loads(one)
            for one in (line.removeprefix("data: ") for line in lines)
        ]

    async def _receive(self) -> dict[str, Any]:
        if self._parts and self._parts[0] is not None:  # None never comes
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.data += message.get("body", b"")
            self.is_whole = not message.get("more_body", False)
        self._changed.set()


async def call(app: Any, path: str, body: Any = None, **how: Any) -> Call:
    """A request to its end."""
    async with Call(app, path, body, **how) as made:
        return await made.to_end()


def calls(app: Any, *requests: tuple[Any, ...], **how: Any) -> list[Call]:
    """Several at once."""

    async def run() -> list[Call]:
        return list(await asyncio.gather(*(call(app, *one, **how) for one in requests)))

    return asyncio.run(run())
