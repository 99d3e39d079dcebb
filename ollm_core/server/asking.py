"""Requests of one client to a session: their events without a thread that waits, and their end when
the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from ollm_core.serving.request import Event, Request
from ollm_core.serving.session import EventStream, Session


class Asking:
    """Submits `requests` together. Use it in an `async with`, whose end cancels what has not
    ended.
    """

    def __init__(self, session: Session, requests: Sequence[Request]) -> None:
        self._session, self._requests = session, requests
        self._streams: list[EventStream] = []
        self._live: dict[int, EventStream] = {}
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()

    async def __aenter__(self) -> Asking:
        """Raises OllmError if the session is closed."""
        try:
            for request in self._requests:
                self._streams.append(self._session.submit(request, self._wake))
        except BaseException:
            self._close()
            raise
        self._live = dict(enumerate(self._streams))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._close()

    @property
    def has_ended(self) -> bool:
        """Whether there are no more events."""
        return not self._live

    def num_read(self, place: int) -> int | None:
        """Tokens of a request's prompt that are read; None while it waits."""
        return self._session.num_read(self._streams[place].request_id)

    async def events(self, seconds: float) -> list[tuple[int, Event]]:
        """What has happened, each with the place of its request: at least one event, or none after
        so many seconds without one.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (found := self._taken()) and self._live:
                    await self._ready.wait()
                return found
        return []

    def _taken(self) -> list[tuple[int, Event]]:
        self._ready.clear()  # before looking: what comes after that wakes again
        found: list[tuple[int, Event]] = []
        for place, stream in [*self._live.items()]:
            try:
                while (event := stream.get(timeout=0)) is not None:
                    found.append((place, event))
            except StopIteration:
                del self._live[place]
        return found

    def _wake(self) -> None:
        """Called in the thread of the session."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ready.set)

    def _close(self) -> None:
        for stream in self._streams:
            stream.close()
