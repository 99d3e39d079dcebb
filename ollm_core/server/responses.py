"""`/v1/responses`: OpenAI's newer form of a chat. Nothing is kept of one: each has all turns in its
body.

Source: the responses page of OpenAI's API reference. What a body asks is put into the words of
chat, and understood there.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from ollm_core.files.untrusted_json import show
from ollm_core.server.answering import Stream, collected, read, reading_body, tell
from ollm_core.server.client import Client, as_json
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.meter import Stopwatch
from ollm_core.server.service import Service
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.requests import RefusedError
from ollm_core.serving.openai.served import Body

_AS_THEY_ARE = ("temperature", "top_p", "stream", "service_tier", "seed", "stop")
_IGNORED = frozenset(
    {
        "model", "user", "metadata", "safety_identifier", "prompt_cache_key", "store", "include",
        "prompt_cache_retention", "parallel_tool_calls", "stream_options",
    }
)  # fmt: skip
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "previous_response_id": (), "conversation": (), "prompt": (), "background": (False,),
    "tools": ([],), "tool_choice": ("none", "auto"), "truncation": ("disabled",),
    "top_logprobs": (0,), "max_tool_calls": (),
    "reasoning": ({},),
}  # fmt: skip
"""Fields that are taken where they ask for what happens anyway."""
_KNOWN = frozenset({"input", "instructions", "max_output_tokens", "text", *_AS_THEY_ARE})
_TEXTS = ("input_text", "output_text")


def understood(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A body in the words of chat. Raises RefusedError, which names the field."""
    said = {name: value for name, value in fields.items() if value is not None}
    for name, value in said.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise RefusedError(
                f"{name}: is not supported, have {show(value)}",
                code="unsupported_parameter",
                param=name,
            )
        if name not in _ONLY and name not in _IGNORED and name not in _KNOWN:
            raise RefusedError(
                f"{show(name)} in the body is not known",
                code="unknown_parameter",
                param=name[:100],
            )
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
    messages = [_message(place, one) for place, one in enumerate(turns)]
    if first is not None:
        messages.insert(0, {"role": "system", "content": first})
    return {**chat, "messages": messages}


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
    left = {name for name, value in turn.items() if value is not None}
    if unknown := left - {"type", "role", "content", "id", "status", "phase"}:
        raise RefusedError(f"{param}: {show(min(unknown))} is not known", param=param)
    content = turn.get("content")
    if isinstance(content, list):
        content = [_part(param, part) for part in content]
    return {"role": turn.get("role"), "content": content}


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
        writer = _Writer(self._service.name, fields)
        async with reading_body(self._service.read_body("chat", chat)) as reading:
            if chat.get("stream") is True:
                stream = Stream(self._service, client, writer.failed)
                await stream.run(reading, lambda body: self._streamed(stream, body, writer))
            else:
                body = await read(client, reading)
                [[answer]] = await collected(client, self._service, body.requests()[0])
                await tell(client, writer.response(body, answer))

    async def _streamed(self, stream: Stream, body: Body, writer: _Writer) -> bytes:
        """Tell the answer in events; -> the end."""
        requests, _ = body.requests()
        answer, watch, num_sent = Answered(), Stopwatch(self._service.meter), 0
        async with self._service.ask(requests) as asking:
            while not asking.has_ended:
                for _, event in await stream.events(asking, requests):
                    watch.count(event)
                    answer.add(event)
                if text := answer.text[num_sent:]:
                    begin = writer.begin(body) if not stream.has_begun else b""
                    await stream.write(begin + writer.delta(text))
                    num_sent += len(text)
        begin = writer.begin(body) if not stream.has_begun else b""
        return begin + writer.end(body, answer)


class _Writer:
    """Writes one response, whole or in events."""

    def __init__(self, model: str, fields: Mapping[str, Any]) -> None:
        self._id, self._message_id = f"resp_{secrets.token_hex(24)}", f"msg_{secrets.token_hex(24)}"
        self._created = int(time.time())
        self._model, self._fields = model, fields
        self._number = 0

    def response(self, body: Body, answer: Answered | None) -> dict[str, Any]:
        """The object; without an `answer`, that of one that is being made."""
        status = "in_progress"
        if answer is not None:
            status = "incomplete" if answer.finish_reason == "length" else "completed"
        sampling = body.asked[0].sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": self._fields.get("instructions"),
            "max_output_tokens": sampling.max_tokens,
            "metadata": self._fields.get("metadata") or {},
            "model": self._model,
            "output": [] if answer is None else [self._item(status, answer.text)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "text": self._fields.get("text") or {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": None if answer is None else _usage(body, answer),
        }

    def begin(self, body: Body) -> bytes:
        """The events before the first text."""
        response = self.response(body, None)
        return (
            self._event("response.created", response=response)
            + self._event("response.in_progress", response=response)
            + self._event(
                "response.output_item.added",
                output_index=0,
                item={**self._item("in_progress", ""), "content": []},
            )
            + self._event("response.content_part.added", **self._place, part=_text(""))
        )

    def delta(self, text: str) -> bytes:
        """More of the text."""
        return self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def end(self, body: Body, answer: Answered) -> bytes:
        """The events after the last text."""
        response = self.response(body, answer)
        status = response["status"]
        part = _text(answer.text)
        item = self._item(status, answer.text)
        return (
            self._event("response.output_text.done", **self._place, text=answer.text, logprobs=[])
            + self._event("response.content_part.done", **self._place, part=part)
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{status}", response=response)
        )

    def failed(self, refused: RefusedRequestError) -> bytes:
        """The last event of one that fails."""
        told = refused.fields["error"]
        return self._event("error", message=told["message"], code=told["code"], param=told["param"])

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, text: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [_text(text)],
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        told = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + as_json(told) + b"\n\n"


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(body: Body, answer: Answered) -> dict[str, Any]:
    num_prompt, num_new = len(body.asked[0].token_ids), len(answer.token_ids)
    return {
        "input_tokens": num_prompt,
        "input_tokens_details": {
            "cached_tokens": answer.counts.num_cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": num_new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + num_new,
    }
