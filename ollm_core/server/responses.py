"""`/v1/responses`: OpenAI's newer form of a chat. Each has all turns in its body; an answer is kept
where its body says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ollm_core.server.answering import Stream, collected, read, reading_body, tell
from ollm_core.server.client import Client
from ollm_core.server.errors import refusal
from ollm_core.server.kept import ID_HEADER, KeptAnswer, follow, tell_whole
from ollm_core.server.meter import Stopwatch
from ollm_core.server.response_bodies import understood
from ollm_core.server.response_events import ResponseWriter
from ollm_core.server.service import Service
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.refused import RefusedError, switch
from ollm_core.serving.openai.served import Body
from ollm_core.text.answer_form import Said


class Responding:
    """Answers bodies."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, client: Client) -> None:
        """Raises what is to be told to the client, and ClientGoneError."""
        fields = await client.read_object(self._service.options.max_body_bytes)
        chat = understood(fields)
        writer = ResponseWriter(self._service.name, fields, self._service.tokenizer)
        if _is_kept(fields):
            await self._keep(client, fields, chat, writer)
            return
        async with reading_body(self._service.read_body("chat", chat)) as reading:
            if chat.get("stream") is True:
                stream = Stream(self._service, client, writer.failure)
                await stream.run(reading, lambda body: self._streamed(stream, body, writer))
            else:
                body = await read(client, reading)
                [[answer]] = await collected(client, self._service, body.requests()[0])
                writer.add(Said(body.asked[0].form).add(answer.text, last=True))
                writer.end(body, answer)
                await tell(client, writer.ended(body, answer))

    async def _keep(
        self,
        client: Client,
        fields: Mapping[str, Any],
        chat: Mapping[str, Any],
        writer: ResponseWriter,
    ) -> None:
        """The answer to be kept; the client is told of it while it is there, unless it is made in
        the background.
        """

        async def work(kept: KeptAnswer) -> None:
            stream = Stream(self._service, kept, writer.failure)
            async with reading_body(self._service.read_body("chat", chat)) as reading:
                try:
                    await stream.run(
                        reading, lambda body: self._streamed(stream, body, writer, kept)
                    )
                except Exception as error:
                    if kept.has_started:
                        kept.keep(writer.failed(_read(reading), refusal(error)))
                    raise

        kept = self._service.kept.start(client, writer.response_id, work)
        is_background = fields.get("background") is True
        if is_background:
            kept.so_far = lambda: writer.response(None, "queued", None)
        if chat.get("stream") is True:
            await follow(client, kept)
        elif is_background:
            await client.unless_gone(kept.begun())
            if kept.so_far is not None:
                await client.tell(200, kept.so_far(), {ID_HEADER: kept.answer_id})
            else:
                await tell_whole(client, kept)
        else:
            await tell_whole(client, kept)

    async def _streamed(
        self,
        stream: Stream,
        body: Body,
        writer: ResponseWriter,
        kept: KeptAnswer | None = None,
    ) -> bytes:
        """Tell the answer in events; -> the end."""
        requests, _ = body.requests()
        answer, watch, num_read = Answered(), Stopwatch(self._service.meter), 0
        said = Said(body.asked[0].form)
        if kept is not None and kept.so_far is not None:
            kept.so_far = lambda: writer.response(body, "in_progress", None)
        async with self._service.ask(requests) as asking:
            while not asking.has_ended:
                for _, event in await stream.events(asking, requests):
                    watch.count(event)
                    answer.add(event)
                pieces = said.add(answer.text[num_read:], last=asking.has_ended)
                num_read = len(answer.text)
                if pieces:
                    begin = b"" if writer.has_begun else writer.begin(body)
                    await stream.write(begin + writer.add(pieces))
        begin = b"" if writer.has_begun else writer.begin(body)
        end = writer.end(body, answer)
        if kept is not None:
            kept.keep(writer.ended(body, answer))
        return begin + end


def _is_kept(fields: Mapping[str, Any]) -> bool:
    """Raises RefusedError for a background that would be lost."""
    store, background = (
        switch(name, value) if (value := fields.get(name)) is not None else None
        for name in ("store", "background")
    )
    if background and store is False:
        raise RefusedError("background: need store to be true", param="background")
    return bool(store or background)


def _read(reading: asyncio.Future[Body]) -> Body | None:
    is_read = reading.done() and not reading.cancelled() and reading.exception() is None
    return reading.result() if is_read else None
