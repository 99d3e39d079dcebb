"""One client of an HTTP request: what it sends, within limits; what it is told; whether it is still
there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from ollm_core.files.untrusted_json import parse_object
from ollm_core.server.errors import ClientGoneError, RefusedRequestError

MAX_DEPTH = 64
"""Of JSON."""
READ_SECONDS = 60.0
"""For all of a body."""
WRITE_SECONDS = 60.0
"""For a client to take what was sent before more is."""
_DRAINED_BYTES = 1 << 20
_DRAIN_SECONDS = 1.0
_SMALL_BODY = 64 << 10  # bytes, parsed in no time

Result = TypeVar("Result")


class Client:
    """Use it in an `async with`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._headers = {name.lower(): value for name, value in scope["headers"]}
        self.method: str = scope["method"]
        self.query: bytes = scope.get("query_string", b"")
        self.params: Mapping[str, str] = scope.get("path_params", {})
        """Of the path, by the names that its route gives them."""
        self._receive, self._send = receive, send
        self._gone: asyncio.Task[None] | None = None
        self._has_all = False
        self.hold: Callable[[int], None] = lambda _: None
        """Called with the number of bytes of a body that are kept; it may refuse them."""
        self.take_place: Callable[[], ExitStack] = ExitStack
        """Its place among requests, to be given back by who takes it."""
        self.has_started = False
        """Whether it was told a status."""

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._gone is not None:
            self._gone.cancel()
            with suppress(asyncio.CancelledError):
                await self._gone

    # What it sends.

    async def read_object(self, max_bytes: int) -> dict[str, Any]:
        """Its body, a JSON object. Raises RefusedRequestError, and ClientGoneError."""
        raw = await self._read(max_bytes)
        try:
            if len(raw) <= _SMALL_BODY:
                return parse_object(raw, strict=True, max_depth=MAX_DEPTH)
            return await asyncio.to_thread(parse_object, raw, strict=True, max_depth=MAX_DEPTH)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise RefusedRequestError(
                400, f"the body: need a JSON object: {reason}", code="invalid_json"
            ) from None

    @property
    def content_type(self) -> bytes:
        """Of what it sends."""
        return bytes(self._headers.get(b"content-type", b""))

    async def _read(self, max_bytes: int) -> bytes:
        parts: list[bytes] = []

        def keep(part: bytes) -> None:
            self.hold(len(part))
            parts.append(part)

        await self.read_parts(max_bytes, READ_SECONDS, keep)
        return b"".join(parts)

    async def read_parts(
        self, max_bytes: int, seconds: float, take: Callable[[bytes], object]
    ) -> None:
        """Hand its body to `take`, part by part. Raises RefusedRequestError, ClientGoneError, and
        what `take` raises.
        """
        length = self._headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > max_bytes:
            raise _too_large(max_bytes)
        num_bytes = 0
        try:
            async with asyncio.timeout(seconds):
                while not self._has_all:
                    part = await self._next_part()
                    num_bytes += len(part)
                    if num_bytes > max_bytes:
                        raise _too_large(max_bytes)
                    take(part)
        except TimeoutError:
            raise RefusedRequestError(
                408, f"the body did not come within {seconds:g} s", code="timeout"
            ) from None

    async def _next_part(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        self._has_all = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def drain(self) -> None:
        """Take what is left of a small body: a connection that is closed before it has come is
        reset, and the client would not see why.
        """
        num_bytes = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._has_all and num_bytes < _DRAINED_BYTES:
                    num_bytes += len(await self._next_part())

    # Whether it is there.

    async def unless_gone(self, wanted: Coroutine[Any, Any, Result]) -> Result:
        """What `wanted` comes to; it is cancelled if the client goes away. Raises ClientGoneError
        then, and what it raises. To be used after the body is read.
        """
        if self._gone is None:
            self._gone = asyncio.ensure_future(self._wait_until_gone())
        task = asyncio.ensure_future(wanted)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if self._gone.done():
            with suppress(asyncio.CancelledError):
                task.exception()  # looked at, or asyncio tells of it
            raise ClientGoneError
        return task.result()

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # What it is told.

    async def start(
        self, status: int, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """The status, and the headers."""
        self.has_started = True
        told = {"content-type": content_type, "cache-control": "no-store", **(headers or {})}
        if not self._has_all:
            told["connection"] = "close"
        pairs = [(name.lower().encode(), value.encode()) for name, value in told.items()]
        await self._within({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """A part of the body. Raises ClientGoneError if the client takes nothing for too long."""
        await self._within({"type": "http.response.body", "body": data, "more_body": more})

    async def tell(
        self, status: int, fields: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole answer."""
        await self.drain()
        data = as_json(fields)
        sizes = {"content-length": str(len(data)), **(headers or {})}
        await self.start(status, "application/json", sizes)
        await self.write(data, more=False)

    async def _within(self, message: MutableMapping[str, Any]) -> None:
        if self._gone is not None and self._gone.done():
            raise ClientGoneError
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientGoneError from None


def as_json(fields: Mapping[str, Any]) -> bytes:
    """One line of ASCII."""
    return json.dumps(fields, separators=(",", ":")).encode()


def _too_large(max_bytes: int) -> RefusedRequestError:
    return RefusedRequestError(
        413, f"the body: need at most {max_bytes} bytes", code="request_too_large"
    )
