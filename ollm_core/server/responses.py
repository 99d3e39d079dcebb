"""`/v1/responses`: OpenAI's newer form of a chat. Each has all turns in its body; an answer is kept
where its body says so.

Source: the responses page of OpenAI's API reference. What a body asks is put into the words of
chat, and understood there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ollm_core.files.untrusted_json import show
from ollm_core.server.answering import Stream, collected, read, reading_body, tell
from ollm_core.server.client import Client
from ollm_core.server.errors import refusal
from ollm_core.server.kept import ID_HEADER, KeptAnswer, follow, tell_whole
from ollm_core.server.meter import Stopwatch
from ollm_core.server.response_events import ResponseWriter
from ollm_core.server.service import Service
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.fields import FUNCTION, SERVED, SHORT, TOOL, TOOL_WORDS
from ollm_core.serving.openai.limits import MAX_TOOLS
from ollm_core.serving.openai.messages import ROLES
from ollm_core.serving.openai.refused import RefusedError, switch
from ollm_core.serving.openai.schemas import (
    ANYTHING,
    NOTHING,
    OBJECT,
    SWITCH,
    TEXT,
    Field,
    Fields,
    any_of,
    check_body,
    check_names,
    ignored,
    list_of,
    nullable,
    object_of,
    one_of,
    only,
    whole,
)
from ollm_core.serving.openai.served import Body
from ollm_core.serving.openai.tools import Said

_AS_THEY_ARE = ("temperature", "top_p", "stream", "service_tier", "seed", "stop")
_TEXTS = ("input_text", "output_text")
_PART = object_of({"type": one_of(*_TEXTS), "text": TEXT}, ["type", "text"], more=True)
_CONTENT = any_of(TEXT, list_of(_PART))
_STATE = {"id": ANYTHING, "status": ANYTHING}
_TURNS = any_of(
    object_of(
        {
            "type": one_of("message"), "role": one_of(*ROLES), "content": _CONTENT,
            "phase": ANYTHING, **_STATE,
        },
        ["role", "content"], NOTHING,
    ),
    object_of(
        {
            "type": one_of("function_call"), "call_id": nullable(SHORT), "name": SHORT,
            "arguments": any_of(TEXT, OBJECT), **_STATE,
        },
        ["type", "name", "arguments"], NOTHING,
    ),
    object_of(
        {
            "type": one_of("function_call_output"), "call_id": nullable(SHORT),
            "output": _CONTENT, **_STATE,
        },
        ["type", "output"], NOTHING,
    ),
)  # fmt: skip
_FORMAT = any_of(
    object_of({"type": one_of("text", "json_object")}, ["type"], more=True),
    object_of({"type": one_of("json_schema"), "schema": OBJECT}, ["type", "schema"], more=True),
)
_FUNCTION = object_of({"type": one_of("function"), **FUNCTION}, ["type", "name"])
_NAMED = object_of({"type": one_of("function"), "name": TEXT}, ["type", "name"], more=True)
FIELDS: Fields = {
    "input": Field(any_of(TEXT, list_of(_TURNS, 1)), required=True),
    "instructions": Field(TEXT),
    "max_output_tokens": Field(whole(1)),
    "text": Field(object_of({"format": _FORMAT})),
    "tools": Field(list_of(any_of(_FUNCTION, TOOL), 0, MAX_TOOLS)),
    "tool_choice": Field(any_of(TOOL_WORDS, _NAMED)),
    "store": Field(SWITCH),
    "background": Field(SWITCH),
    **{name: SERVED["chat"][name] for name in _AS_THEY_ARE},
    "previous_response_id": only(),
    "conversation": only(),
    "prompt": only(),
    "truncation": only("disabled"),
    "top_logprobs": only(0),
    "max_tool_calls": only(),
    "reasoning": only({}),
    **ignored(
        "model", "user", "metadata", "safety_identifier", "prompt_cache_key", "include",
        "prompt_cache_retention", "parallel_tool_calls", "stream_options",
    ),
}  # fmt: skip


def understood(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A body in the words of chat. Raises RefusedError, which names the field."""
    said = {name: value for name, value in fields.items() if value is not None}
    check_names(FIELDS, said)
    chat = {name: said[name] for name in _AS_THEY_ARE if name in said}
    if "max_output_tokens" in said:
        chat["max_completion_tokens"] = said["max_output_tokens"]
    if (wanted := _format(said.get("text", {}))) is not None:
        chat["response_format"] = wanted
    turns, first = said.get("input"), said.get("instructions")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns:
        raise RefusedError(
            f"input: need a text or a list of at least one turn, have {show(turns)}", param="input"
        )
    messages: list[dict[str, Any]] = []
    if first is not None:
        messages.append({"role": "system", "content": first})
    for place, turn in enumerate(turns):
        _add(messages, place, turn)
    check_body(FIELDS, fields)
    return {**chat, **_tools(said), "messages": messages}


def _tools(said: Mapping[str, Any]) -> dict[str, Any]:
    """The functions, in the words of chat."""
    chat: dict[str, Any] = {}
    if "tools" in said:
        tools = said["tools"]
        chat["tools"] = [_nested(one) for one in tools] if isinstance(tools, list) else tools
    if "tool_choice" in said:
        chat["tool_choice"] = _nested(said["tool_choice"])
    return chat


def _nested(tool: Any) -> Any:
    """A function has its fields in an object of its own."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    own = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": own}


def _add(messages: list[dict[str, Any]], place: int, turn: Any) -> None:
    """One more turn: a message, a call of the assistant's, or what one gave."""
    kind = turn.get("type", "message") if isinstance(turn, dict) else None
    if kind == "function_call":
        _check_fields(place, turn, {"type", "id", "call_id", "name", "arguments", "status"})
        function = {"name": turn.get("name"), "arguments": turn.get("arguments")}
        call = {"id": turn.get("call_id"), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        _check_fields(place, turn, {"type", "id", "call_id", "output", "status"})
        content, call_id = _content(place, turn.get("output")), turn.get("call_id")
        messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    else:
        messages.append(_message(place, turn))


def _format(text: Any) -> dict[str, Any] | None:
    """What an answer is to follow, in the words of chat; None where that is nothing."""
    wanted = text.get("format", {"type": "text"}) if isinstance(text, dict) else None
    if not isinstance(wanted, dict) or text.keys() - {"format"}:
        raise RefusedError(
            f"text: need an object with a format, have {show(text)}",
            code="unsupported_parameter",
            param="text",
        )
    if wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    return dict(wanted)


def _message(place: int, turn: Any) -> dict[str, Any]:
    param = f"input[{place}]"
    if not isinstance(turn, dict) or turn.get("type", "message") != "message":
        raise RefusedError(
            f"{param}: need a message, have {show(turn)}",
            code="unsupported_parameter",
            param=param,
        )
    _check_fields(place, turn, {"type", "role", "content", "id", "status", "phase"})
    return {"role": turn.get("role"), "content": _content(place, turn.get("content"))}


def _check_fields(place: int, turn: Mapping[str, Any], known: set[str]) -> None:
    left = {name for name, value in turn.items() if value is not None}
    if unknown := left - known:
        param = f"input[{place}]"
        raise RefusedError(f"{param}: {show(min(unknown))} is not known", param=param)


def _content(place: int, content: Any) -> Any:
    if isinstance(content, list):
        return [_part(f"input[{place}]", part) for part in content]
    return content


def _part(param: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") not in _TEXTS:
        raise RefusedError(
            f"{param}: content: need parts of type {' or '.join(_TEXTS)}, have {show(part)}",
            code="unsupported_parameter",
            param=param,
        )
    return {"type": "text", "text": part.get("text")}


class Responding:
    """Answers bodies."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, client: Client) -> None:
        """Raises what is to be told to the client, and ClientGoneError."""
        fields = await client.read_object(self._service.options.max_body_bytes)
        chat = understood(fields)
        writer = ResponseWriter(self._service.name, fields)
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
                writer.add(Said(body.asked[0].tools).add(answer.text, last=True))
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
        said = Said(body.asked[0].tools)
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
