"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ollm_core.server.answering import Stream, collected, read, reading_body, tell
from ollm_core.server.client import Client, as_json
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.kept import KeptAnswer, follow, tell_whole
from ollm_core.server.meter import Stopwatch
from ollm_core.server.service import Service
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.answers import Echo, new_answer_id, usage
from ollm_core.serving.openai.chunks import Chunks
from ollm_core.serving.openai.refused import switch
from ollm_core.serving.openai.requests import Kind
from ollm_core.serving.openai.served import Body
from ollm_core.serving.request import Finished, NewToken, Scored, TokenLogprobs


class Completions:
    """Answers bodies of one kind."""

    def __init__(self, service: Service, kind: Kind) -> None:
        self._service, self._kind = service, kind

    async def __call__(self, client: Client) -> None:
        """Raises what is to be told to the client, and ClientGoneError."""
        fields = await client.read_object(self._service.options.max_body_bytes)
        store = fields.get("store") if self._kind == "chat" else None
        if store is not None and switch("store", store):
            await self._keep(client, fields)
            return
        async with reading_body(self._service.read_body(self._kind, fields)) as reading:
            if fields.get("stream") is True:
                stream = Stream(self._service, client, failed)
                await stream.run(reading, lambda body: self.streamed(stream, body))
            else:
                await self._whole(client, await read(client, reading))

    async def _keep(self, client: Client, fields: Mapping[str, Any]) -> None:
        """The answer to be kept; the client is told of it while it is there."""
        answer_id = new_answer_id(self._kind)

        async def work(kept: KeptAnswer) -> None:
            stream = Stream(self._service, kept, failed)
            async with reading_body(self._service.read_body(self._kind, fields)) as reading:
                await stream.run(
                    reading, lambda body: self.streamed(stream, body, answer_id, kept.keep)
                )

        kept = self._service.kept.start(client, answer_id, work)
        if fields.get("stream") is True:
            await follow(client, kept)
        else:
            await tell_whole(client, kept)

    async def _whole(self, client: Client, body: Body) -> None:
        """The answer as one object."""
        asked, scores = body.requests()
        scoring = [one for one in scores if one is not None]
        found = await collected(client, self._service, [*asked, *scoring])
        answers = found[: len(asked)]
        if body.answers:
            scored = [one[0].scored for one in answers]
        else:
            of_each = iter(one[0].scored for one in found)
            scored = [None if one is None else next(of_each) for one in scores]
            answers = [[Answered(finish_reason="length")] for _ in body.asked]
        await tell(client, self._fields(body, answers, self._echoes(body, scored)))

    def _fields(
        self,
        body: Body,
        answers: Sequence[Sequence[Answered]],
        echoes: Sequence[Echo | None],
        chunks: Chunks | None = None,
    ) -> dict[str, Any]:
        bodies = [
            self._service.writer.body(*each)
            for each in zip(body.asked, answers, echoes, strict=True)
        ]
        choices = [choice for one in bodies for choice in one["choices"]]
        choices = [{**choice, "index": index} for index, choice in enumerate(choices)]
        if chunks is not None:
            return chunks.whole(choices, usage(body.asked, answers))
        return {**bodies[0], "choices": choices, "usage": usage(body.asked, answers)}

    def _echoes(self, body: Body, scored: Sequence[Scored | None]) -> list[Echo | None]:
        """Each prompt again, with what was scored of it."""
        if not body.echo:
            return [None] * len(body.asked)
        echoes: list[Echo | None] = []
        for asked, text, found in zip(body.asked, body.prompts, scored, strict=True):
            told: list[TokenLogprobs | None] = []
            if body.scored:
                told = [None, *_told(found, asked.sampling.logprobs or 0)]
            shown = self._service.writer.decode(asked.token_ids) if text is None else text
            echoes.append(Echo(shown, asked.token_ids if body.scored else (), told))
        return echoes

    async def streamed(
        self,
        stream: Stream,
        body: Body,
        answer_id: str | None = None,
        keep: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> bytes:
        """Tell the answer in chunks; -> the end. It has this id, and `keep` is given all of it."""
        requests, _ = body.requests()
        chunks = Chunks(
            self._service.writer,
            body.kind,
            wants_logprobs=body.asked[0].sampling.logprobs is not None,
            with_usage=body.with_usage,
            form=body.asked[0].form,
            answer_id=answer_id,
        )
        answers = [[Answered() for _ in range(body.num_answers)] for _ in body.asked]
        watch, begun = Stopwatch(self._service.meter), set[int]()
        async with self._service.ask(requests) as asking:
            while not asking.has_ended:
                made: list[dict[str, Any] | None] = []
                for place, event in await stream.events(asking, requests):
                    watch.count(event)
                    index = place * body.num_answers + event.index
                    if isinstance(event, NewToken | Finished) and index not in begun:
                        begun.add(index)
                        made.append(chunks.first(index, self._echo(body, place)))
                    made += _chunks(chunks, index, event)
                    answers[place][event.index].add(event)
                await stream.write(b"".join(_data(one) for one in made if one is not None))
        if answer_id is not None:
            keep(self._fields(body, answers, [None] * len(body.asked), chunks))
        end = _data(chunks.usage(usage(body.asked, answers))) if body.with_usage else b""
        return end + b"data: [DONE]\n\n"

    def _echo(self, body: Body, place: int) -> str:
        if not body.echo:
            return ""
        text = body.prompts[place]
        return self._service.writer.decode(body.asked[place].token_ids) if text is None else text


def _chunks(chunks: Chunks, index: int, event: object) -> list[dict[str, Any] | None]:
    """Of one event."""
    if isinstance(event, NewToken):
        return [*chunks.token(index, event)]
    if isinstance(event, Finished):
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


def failed(refused: RefusedRequestError) -> bytes:
    """The last event of a stream that fails."""
    return _data(refused.fields)


def _data(fields: Mapping[str, Any]) -> bytes:
    return b"data: " + as_json(fields) + b"\n\n"
