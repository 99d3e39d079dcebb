"""Listens: uvicorn, with limits for connections and for how long a request may take to come."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ollm_core.errors import InputError
from ollm_core.server.guard import is_loopback
from ollm_core.server_options import ServerOptions

HEAD_SECONDS = 20.0
"""For the head of a request to come, once its connection is there or its first byte."""
IDLE_SECONDS = 30
"""Between two requests of a connection."""
_END_SECONDS = 10
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)


class LimitedProtocol(H11Protocol):
    """A connection of uvicorn's. One too many is told so; one whose request's head does not come is
    closed.
    """

    max_connections = 512
    head_seconds = HEAD_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.write(_FULL)
            transport.close()
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Listener(uvicorn.Server):
    """Runs an application until a signal asks for the end, then tells `before_end`."""

    def __init__(
        self, app: ASGIApp, options: ServerOptions, before_end: Callable[[], None]
    ) -> None:
        limits = {"max_connections": options.max_connections}
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Limited", (LimitedProtocol,), limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=_END_SECONDS,
            )
        )
        self._before_end = before_end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, when it has been asked to end."""
        await asyncio.to_thread(self._before_end)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Called by uvicorn. What was there comes back, and nothing is raised after: the end that a
        signal asks of a server is a good one.
        """
        before = {}
        with contextlib.suppress(ValueError):  # not in the main thread: nobody signals it
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)


def bound(options: ServerOptions) -> socket.socket:
    """A socket that listens where the options say. Raises InputError where it cannot, and for one
    that others can reach without a key.
    """
    if options.api_key is None and not is_loopback(options.host):
        raise InputError(
            f"host {options.host} can be reached by others: need an API key, have none",
            hint="set OLLM_API_KEY, or leave --host out",
        )
    try:
        found = socket.getaddrinfo(
            options.host, int(options.port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen on {options.host}, port {options.port}: {reason}",
            hint="choose another --port, or 0 for a free one",
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """http://HOST:PORT."""
    name: Any = listener.getsockname()
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"
