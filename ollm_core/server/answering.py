"""Waits for answers and keeps clients who wait: whole ones, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ollm_core.server.asking import Asking
from ollm_core.server.client import Client, as_json
from ollm_core.server.errors import ClientGoneError, RefusedRequestError, refusal, stopping
from ollm_core.server.kept import PATIENCE_SECONDS, STREAM, Sink
from ollm_core.server.meter import Stopwatch
from ollm_core.server.service import Service
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.served import Body
from ollm_core.serving.request import Event, Failed, Finished, Request, SamplingParams

PROGRESS_SECONDS = 1.0
"""Between two comments before the first token."""
KEEP_ALIVE_SECONDS = 10.0
"""Between two bytes after it."""
_READ_SECONDS = 0.5
"""For a prompt to be read before a stream is begun: what is refused by then has a status."""


async def collected(
    client: Client, service: Service, requests: Sequence[Request]
) -> list[list[Answered]]:
    """The answers to each request, when there are all. Raises what one of them has failed by."""
    answers = [[Answered() for _ in range(num_answers(one))] for one in requests]
    watch = Stopwatch(service.meter)
    async with service.ask(requests) as asking:
        while not asking.has_ended:
            events = await client.unless_gone(asking.events(PATIENCE_SECONDS))
            if not events and not asking.has_ended:
                await _have_patience(client)
            for place, event in events:
                watch.count(event)
                check(event)
                answers[place][event.index].add(event)
    return answers


async def tell(client: Client, fields: Mapping[str, Any]) -> None:
    """A whole answer, which white space may have begun."""
    if client.has_started:
        await client.write(as_json(fields), more=False)
    else:
        await client.tell(200, fields)


def num_answers(request: Request) -> int:
    """Of one request."""
    return request.wanted.n if isinstance(request.wanted, SamplingParams) else 1


def check(event: Event) -> None:
    """Raises what an event tells to have failed."""
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Finished) and event.reason == "cancelled":
        raise stopping()


@asynccontextmanager
async def reading_body(wanted: Coroutine[Any, Any, Body]) -> AsyncIterator[asyncio.Future[Body]]:
    """A body that is being read meanwhile, for the length of an `async with`."""
    reading = asyncio.ensure_future(wanted)
    try:
        yield reading
    finally:
        if not reading.cancel() and not reading.cancelled():
            reading.exception()  # looked at, or asyncio tells of it


async def read(client: Client, reading: asyncio.Future[Body]) -> Body:
    """A body that is being read. Raises RefusedError, and ClientGoneError."""

    async def result() -> Body:
        return await reading

    return await client.unless_gone(result())


class Stream:
    """Server-sent events of one answer. Comments, which clients skip, say how far it is."""

    def __init__(
        self, service: Service, client: Sink, failed: Callable[[RefusedRequestError], bytes]
    ) -> None:
        """`failed` makes the last event of one that fails."""
        self._service, self._client, self._failed = service, client, failed
        self._told = -KEEP_ALIVE_SECONDS  # never
        self.has_begun = False
        """Whether the client has had an event."""

    async def run(
        self, reading: asyncio.Future[Body], answer: Callable[[Body], Awaitable[bytes]]
    ) -> None:
        """Tell what `answer` does of the body, and what it returns as the last event. Raises what
        is to be told with a status of its own, before the first byte alone.
        """
        await self._client.unless_gone(_wait(reading, _READ_SECONDS))
        headers = {"x-accel-buffering": "no"}
        if reading.done():
            headers |= forecast_headers(self._service, reading.result())
        self._service.ask([])  # is it open?
        await self._client.start(200, STREAM, headers)
        try:
            await self._comment({"state": "received"})
            self._told = -PROGRESS_SECONDS  # where it is, is told soon
            while not reading.done():
                await self._client.unless_gone(_wait(reading, PROGRESS_SECONDS))
                await self._comment({"state": "encoding"})
            await self._client.write(await answer(reading.result()), more=False)
        except ClientGoneError:
            raise
        except Exception as error:  # the client is told, in the stream
            await self._client.write(self._failed(refusal(error)), more=False)
            raise

    async def events(self, asking: Asking, requests: Sequence[Request]) -> list[tuple[int, Event]]:
        """What has happened, if anything; if not, or if nothing was told of for long, the client is
        told how far it is. Raises what has failed.
        """
        between = KEEP_ALIVE_SECONDS if self.has_begun else PROGRESS_SECONDS
        seconds = max(self._told + between - time.monotonic(), 0.001)
        events = await self._client.unless_gone(asking.events(seconds))
        for _, event in events:
            check(event)
        if not events and not asking.has_ended:
            standing = self._service.standing(asking, requests)
            await self._comment({"state": "decoding"} if self.has_begun else standing)
        return events

    async def write(self, data: bytes) -> None:
        """Events."""
        if data:
            self.has_begun = True
            self._told = time.monotonic()
            await self._client.write(data)

    async def _comment(self, fields: Mapping[str, Any]) -> None:
        self._told = time.monotonic()
        await self._client.write(b": " + as_json(fields) + b"\n\n")


def forecast_headers(service: Service, body: Body) -> dict[str, str]:
    """What is known of an answer before it begins: tokens of its longest prompt, and by the plan
    the seconds until its first token, if nobody else asks. What this run has read of it before
    takes none.
    """
    longest = max((one.token_ids for one in body.asked), key=len)
    headers = {"ollm-prompt-tokens": str(len(longest))}
    num_kept = service.cached.num_kept(longest)
    if (forecast := service.forecasts.of(len(longest), num_kept)) is not None:
        headers["ollm-forecast-seconds"] = f"{forecast.seconds:.1f}"
    return headers


async def _have_patience(client: Client) -> None:
    if not client.has_started:
        await client.start(200, "application/json")
    await client.write(b"\n")


async def _wait(future: asyncio.Future[Any], seconds: float) -> None:
    await asyncio.wait({future}, timeout=seconds)
