"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.server.asking import Asking
from ollm_core.server.client import Client, as_json
from ollm_core.server.errors import ClientGoneError, RefusedRequestError, refusal
from ollm_core.server.meter import Stopwatch
from ollm_core.server.service import Service
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.answers import Echo, usage
from ollm_core.serving.openai.chunks import Chunks
from ollm_core.serving.openai.requests import Kind
from ollm_core.serving.openai.served import Body
from ollm_core.serving.request import Failed, Finished, NewToken, Request, Scored, TokenLogprobs

PROGRESS_SECONDS = 1.0
"""Between two comments before the first token."""
KEEP_ALIVE_SECONDS = 10.0
"""Between two bytes after it."""
PATIENCE_SECONDS = 30.0
"""Until an answer that is no stream is begun with white space, so that nobody on the way gives it
up. From then on what fails can be told by an answer that breaks off alone.
"""
_READ_SECONDS = 0.5
"""For a prompt to be read before a stream is begun: what is refused by then has a status."""
_STREAM = "text/event-stream; charset=utf-8"


class Completions:
    """Answers bodies of one kind."""

    def __init__(self, service: Service, kind: Kind) -> None:
        self._service, self._kind = service, kind

    async def __call__(self, client: Client) -> None:
        """Raises what is to be told to the client, and ClientGoneError."""
        fields = await client.read_object(self._service.options.max_body_bytes)
        reading = asyncio.ensure_future(self._service.read_body(self._kind, fields))
        try:
            if fields.get("stream") is True:
                await _Stream(self._service, client).run(self._kind, reading)
            else:
                body = await client.unless_gone(_result(reading))
                await self._whole(client, body)
        finally:
            if not reading.cancel() and not reading.cancelled():
                reading.exception()  # looked at, or asyncio tells of it

    async def _whole(self, client: Client, body: Body) -> None:
        """The answer as one object."""
        asked, scores = body.requests()
        requests = [*asked, *(one for one in scores if one is not None)]
        answers = [
            [Answered() for _ in range(body.num_answers)] if body.answers else [Answered()]
            for _ in body.asked
        ]
        scored: list[Answered] = [Answered() for _ in requests[len(asked) :]]
        watch = Stopwatch(self._service.meter)
        async with self._service.ask(requests) as asking:
            while not asking.has_ended:
                events = await client.unless_gone(asking.events(PATIENCE_SECONDS))
                if not events and not asking.has_ended:
                    await _patience(client)
                for place, event in events:
                    watch.count(event)
                    if place < len(asked):
                        answers[place][event.index].add(event)
                    else:
                        scored[place - len(asked)].add(event)
        found = [one for several in answers for one in several] + scored
        for one in found:
            if one.error is not None:
                raise one.error
            if one.finish_reason == "cancelled":
                raise RefusedRequestError(503, "the server is being stopped")
        if not body.answers:
            for several in answers:
                several[0].finish_reason = "length"
        echoes = self._echoes(body, scores, scored)
        fields = self._fields(body, answers, echoes)
        if client.has_started:
            await client.write(as_json(fields), more=False)
        else:
            await client.tell(200, fields)

    def _fields(
        self, body: Body, answers: Sequence[Sequence[Answered]], echoes: Sequence[Echo | None]
    ) -> dict[str, Any]:
        bodies = [
            self._service.writer.body(*each)
            for each in zip(body.asked, answers, echoes, strict=True)
        ]
        choices = [choice for one in bodies for choice in one["choices"]]
        choices = [{**choice, "index": index} for index, choice in enumerate(choices)]
        return {**bodies[0], "choices": choices, "usage": usage(body.asked, answers)}

    def _echoes(
        self, body: Body, scores: Sequence[Request | None], scored: Sequence[Answered]
    ) -> list[Echo | None]:
        """Each prompt again, with what was scored of it."""
        if not body.echo:
            return [None] * len(body.asked)
        of_each = iter(scored)
        echoes: list[Echo | None] = []
        for asked, text, score in zip(body.asked, body.prompts, scores, strict=True):
            told: list[TokenLogprobs | None] = []
            if body.scored:
                found = next(of_each).scored if score is not None else None
                told = [None, *_told(found, asked.sampling.logprobs or 0)]
            shown = self._service.writer.decode(asked.token_ids) if text is None else text
            echoes.append(Echo(shown, asked.token_ids if body.scored else (), told))
        return echoes


class _Stream:
    """Server-sent events of one answer. Comments, which clients skip, say how far it is."""

    def __init__(self, service: Service, client: Client) -> None:
        self._service, self._client = service, client

    async def run(self, kind: Kind, reading: asyncio.Future[Body]) -> None:
        """Raises what is to be told with a status of its own, before the first byte alone."""
        await self._client.unless_gone(_wait(reading, _READ_SECONDS))
        if reading.done():
            reading.result()
        self._service.ask([])  # is it open?
        await self._client.start(200, _STREAM, {"x-accel-buffering": "no"})
        try:
            await self._comment({"state": "received"})
            while not reading.done():
                await self._client.unless_gone(_wait(reading, PROGRESS_SECONDS))
                await self._comment({"state": "encoding"})
            await self._answer(reading.result())
            await self._client.write(b"data: [DONE]\n\n", more=False)
        except ClientGoneError:
            raise
        except Exception as error:  # the client is told, in the stream
            await self._client.write(_data(refusal(error).fields), more=False)
            raise

    async def _answer(self, body: Body) -> None:
        requests, _ = body.requests()
        chunks = Chunks(
            self._service.writer,
            body.kind,
            wants_logprobs=body.asked[0].sampling.logprobs is not None,
            with_usage=body.with_usage,
        )
        answers = [[Answered() for _ in range(body.num_answers)] for _ in body.asked]
        watch, begun = Stopwatch(self._service.meter), set[int]()
        async with self._service.ask(requests) as asking:
            await self._tell_progress(asking, requests)
            while not asking.has_ended:
                seconds = KEEP_ALIVE_SECONDS if begun else PROGRESS_SECONDS
                events = await self._client.unless_gone(asking.events(seconds))
                made: list[dict[str, Any] | None] = []
                for place, event in events:
                    watch.count(event)
                    index = place * body.num_answers + event.index
                    if isinstance(event, NewToken | Finished) and index not in begun:
                        begun.add(index)
                        made.append(chunks.first(index, self._echo(body, place)))
                    made += _chunks(chunks, index, event)
                    answers[place][event.index].add(event)
                if data := b"".join(_data(one) for one in made if one is not None):
                    await self._client.write(data)
                elif not asking.has_ended and not events:
                    await self._tell_progress(asking, requests, has_begun=bool(begun))
        if body.with_usage:
            await self._client.write(_data(chunks.usage(usage(body.asked, answers))))

    def _echo(self, body: Body, place: int) -> str:
        if not body.echo:
            return ""
        text = body.prompts[place]
        return self._service.writer.decode(body.asked[place].token_ids) if text is None else text

    async def _tell_progress(
        self, asking: Asking, requests: Sequence[Request], *, has_begun: bool = False
    ) -> None:
        if has_begun:
            await self._comment({"state": "decoding"})
        else:
            await self._comment(self._service.standing(asking, requests))

    async def _comment(self, fields: Mapping[str, Any]) -> None:
        await self._client.write(b": " + as_json(fields) + b"\n\n")


def _chunks(chunks: Chunks, index: int, event: object) -> list[dict[str, Any] | None]:
    """Of one event. Raises what it tells to have failed."""
    if isinstance(event, NewToken):
        return [chunks.token(index, event)]
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Finished):
        if event.reason == "cancelled":
            raise RefusedRequestError(503, "the server is being stopped")
        return [*chunks.last(index, event.text, event.reason)]
    return []


def _told(scored: Scored | None, num_top: int) -> list[TokenLogprobs | None]:
    """Of each token but the first: asked for `num_top` of the likeliest, at least the one that says
    whether it is that itself.
    """
    if scored is None:
        return []
    return [
        TokenLogprobs(logprob, top if num_top else ())
        for logprob, top in zip(scored.logprobs, scored.top, strict=True)
    ]


async def _patience(client: Client) -> None:
    if not client.has_started:
        await client.start(200, "application/json")
    await client.write(b"\n")


async def _wait(future: asyncio.Future[Any], seconds: float) -> None:
    await asyncio.wait({future}, timeout=seconds)


async def _result(future: asyncio.Future[Body]) -> Body:
    return await future


def _data(fields: Mapping[str, Any]) -> bytes:
    return b"data: " + as_json(fields) + b"\n\n"
