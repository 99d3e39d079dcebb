"""Answers that clients asked to have kept: they go on when a client goes away, and are told again
by their ids, from any place on. In memory alone: for a while, up to a number and bytes, and until
the server ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Protocol, TypeVar

from ollm_core.server.client import Client, as_json
from ollm_core.server.errors import RefusedRequestError, stopping

MAX_KEPT = 256
"""Answers."""
ID_HEADER = "ollm-answer-id"
STREAM = "text/event-stream; charset=utf-8"
PATIENCE_SECONDS = 30.0
"""Until an answer that is no stream is begun with white space, so that nobody on the way gives it
up. From then on what fails can be told by an answer that breaks off alone.
"""

Result = TypeVar("Result")


class Sink(Protocol):
    """What an answer is told to: a client, or one that keeps it."""

    async def unless_gone(self, wanted: Coroutine[Any, Any, Result]) -> Result:
        """What `wanted` comes to, unless nobody waits for it any more."""

    async def start(
        self, status: int, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """The status, and the headers."""

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """A part of the body."""


class KeptAnswer:
    """One answer, as far as it is. A sink of server-sent events, each of which has a number."""

    def __init__(self, answer_id: str, take_room: Callable[[KeptAnswer, int], None]) -> None:
        """`take_room` is told of each byte more, and may refuse it."""
        self.answer_id = answer_id
        self.headers: Mapping[str, str] = {}
        self.events: list[bytes] = []
        self.comment = b""
        """The last one: comments are not kept."""
        self.num_comments = 0
        self.num_bytes = 0
        self.whole: bytes | None = None
        """All of it as a JSON object, when it has ended well."""
        self.so_far: Callable[[], dict[str, Any]] | None = None
        """An object that says how far it is, for those who need not wait."""
        self.error: Exception | None = None
        self.has_started = False
        self.ended: float | None = None
        """When, by time.monotonic."""
        self.task: asyncio.Task[None] | None = None
        self._take_room = take_room
        self._followers: set[asyncio.Event] = set()

    async def unless_gone(self, wanted: Coroutine[Any, Any, Result]) -> Result:
        """What `wanted` comes to: it is never given up."""
        return await wanted

    async def start(
        self, status: int, content_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Its body is understood."""
        self.has_started, self.headers = True, dict(headers or {})
        self._tell()

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Events, or one comment. Raises RefusedRequestError if there is no room for them, but for
        the last ones.
        """
        if data.startswith(b":"):
            self.comment, self.num_comments = data, self.num_comments + 1
        else:
            if more:
                self._take_room(self, len(data))
            self.events += [one + b"\n\n" for one in data.split(b"\n\n")[:-1]]
        self._tell()

    def keep(self, fields: Mapping[str, Any]) -> None:
        """All of it. Raises RefusedRequestError."""
        whole = as_json(fields)
        self._take_room(self, len(whole))
        self.whole = whole

    def end(self, error: Exception | None = None) -> None:
        """Nothing more comes. May be called twice."""
        if self.ended is None:
            self.error, self.ended, self.so_far = error, time.monotonic(), None
            self._tell()

    async def changed(self, seconds: float | None) -> bool:
        """Wait until there is more to tell; False after so many seconds without."""
        waiting = asyncio.Event()
        self._followers.add(waiting)
        try:
            async with asyncio.timeout(seconds):
                await waiting.wait()
        except TimeoutError:
            return False
        finally:
            self._followers.discard(waiting)
        return True

    async def begun(self) -> None:
        """Wait until its body is understood. Raises what it was refused by."""
        while not self.has_started and self.ended is None:
            await self.changed(None)
        if not self.has_started:
            raise self.error or stopping()

    def _tell(self) -> None:
        for one in self._followers:
            one.set()


class KeptAnswers:
    """All of them, by their ids. Used in the event loop alone."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        """`seconds` are how long one is kept after its end."""
        self._max_bytes, self._seconds = max_bytes, seconds
        self._answers: dict[str, KeptAnswer] = {}

    @property
    def number(self) -> int:
        """Of answers."""
        return len(self._answers)

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(one.num_bytes for one in self._answers.values())

    def start(
        self, client: Client, answer_id: str, work: Callable[[KeptAnswer], Awaitable[None]]
    ) -> KeptAnswer:
        """Let `work` make an answer, which has the client's place until it ends. Raises
        RefusedRequestError if there are too many.
        """
        while len(self._answers) >= MAX_KEPT:
            self._drop_oldest(None)
        made = self._answers[answer_id] = KeptAnswer(answer_id, self._take_room)
        made.task = asyncio.ensure_future(self._run(made, work, client.take_place()))
        return made

    def get(self, answer_id: str) -> KeptAnswer:
        """Raises RefusedRequestError if there is none."""
        found = self._answers.get(answer_id)
        if found is not None and found.ended is not None:
            if time.monotonic() < found.ended + self._seconds:
                return found
            self._forget(answer_id)
        elif found is not None:
            return found
        raise RefusedRequestError(404, "there is no such answer here", code="not_found")

    async def remove(self, answer_id: str) -> None:
        """Forget one; what is not made of it yet is given up. Raises RefusedRequestError."""
        found = self.get(answer_id)
        self._forget(answer_id)
        await stop(found)

    def clear(self) -> None:
        """Forget all."""
        self._answers = {}

    async def _run(
        self, made: KeptAnswer, work: Callable[[KeptAnswer], Awaitable[None]], place: ExitStack
    ) -> None:
        with place:
            try:
                await work(made)
            except Exception as error:  # noqa: BLE001 # those who fetch it are told
                made.end(error)
            finally:
                made.end(None if made.whole is not None else stopping())
                seconds = self._seconds if made.has_started else 0
                loop = asyncio.get_running_loop()
                loop.call_later(seconds, self._forget, made.answer_id)

    def _take_room(self, answer: KeptAnswer, num_bytes: int) -> None:
        while self.num_bytes + num_bytes > self._max_bytes:
            self._drop_oldest(answer)
        answer.num_bytes += num_bytes

    def _drop_oldest(self, but: KeptAnswer | None) -> None:
        ended = [(one.ended, one.answer_id) for one in self._answers.values() if one.ended]
        if not ended:
            raise RefusedRequestError(
                429 if but is None else 507,
                "there is no room to keep the answer",
                code="no_room",
                headers={"Retry-After": "60"},
            )
        self._forget(min(ended)[1])

    def _forget(self, answer_id: str) -> None:
        self._answers.pop(answer_id, None)


async def stop(answer: KeptAnswer) -> None:
    """Give up what is not made of it yet, and wait for that."""
    if answer.task is not None and not answer.task.done():
        answer.task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({answer.task})


async def follow(client: Client, answer: KeptAnswer, after: int = -1) -> None:
    """Tell a client its events, those with a number above `after`, as they come. Raises what it
    was refused by, and ClientGoneError.
    """
    await client.unless_gone(answer.begun())
    await client.start(200, STREAM, {**answer.headers, ID_HEADER: answer.answer_id})
    at, told = after + 1, 0
    while True:
        data = b"".join(answer.events[at:])
        at = max(at, len(answer.events))
        if not data and answer.num_comments > told:
            data = answer.comment
        told = answer.num_comments
        has_ended = answer.ended is not None
        if data or has_ended:
            await client.write(data, more=not has_ended)
        if has_ended:
            return
        if at >= len(answer.events):
            await client.unless_gone(answer.changed(None))


async def tell_whole(client: Client, answer: KeptAnswer) -> None:
    """Tell a client all of it, when it has ended; its id comes at once. Raises as `follow`, and
    what it has failed by.
    """
    await client.unless_gone(answer.begun())
    await client.start(200, "application/json", {ID_HEADER: answer.answer_id})
    told = time.monotonic()
    while answer.ended is None:
        seconds = max(told + PATIENCE_SECONDS - time.monotonic(), 0.001)
        if not await client.unless_gone(answer.changed(seconds)):
            await client.write(b"\n")
            told = time.monotonic()
    if answer.whole is None:
        raise answer.error or stopping()
    await client.write(answer.whole, more=False)
