"""Writes one response in OpenAI's form: as an object, and as the events of its stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.server.client import as_json
from ollm_core.server.errors import RefusedRequestError
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.served import Body
from ollm_core.text.thoughts import Thought
from ollm_core.text.tool_calls import Call, Piece


class ResponseWriter:
    """Its output is thoughts, messages and calls of functions, in the order in which they come."""

    def __init__(self, model: str, fields: Mapping[str, Any], tokenizer: Any) -> None:
        """`fields` are the body's own; `tokenizer` counts what is thought."""
        self._tokenizer = tokenizer
        self.response_id = f"resp_{secrets.token_hex(24)}"
        self._created = int(time.time())
        self._model, self._fields = model, fields
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._text: str | None = None
        """Of the message or thought that goes on, which is the last of the output."""
        self._thinks = False
        """Whether that is a thought."""
        self.has_begun = False

    # The object.

    def response(self, body: Body | None, status: str, answer: Answered | None) -> dict[str, Any]:
        """As far as it is: without a `body` it is not understood yet, without an `answer` not at
        its end.
        """
        fields = self._fields
        sampling = None if body is None else body.asked[0].sampling
        tools = None if body is None else body.asked[0].tools
        is_incomplete = status == "incomplete"
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": fields.get("background") is True,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_incomplete else None,
            "instructions": fields.get("instructions"),
            "max_output_tokens": None if sampling is None else sampling.max_tokens,
            "metadata": fields.get("metadata") or {},
            "model": self._model,
            "output": [*self._output],
            "parallel_tool_calls": tools is not None and not tools.forced,
            "previous_response_id": None,
            "store": fields.get("store") is True,
            "temperature": None if sampling is None else sampling.temperature,
            "top_p": None if sampling is None else sampling.top_p,
            "text": fields.get("text") or {"format": {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or ("auto" if tools else "none"),
            "tools": fields.get("tools") or [],
            "truncation": "disabled",
            "usage": None if answer is None or body is None else self._usage(body, answer),
        }

    def ended(self, body: Body, answer: Answered) -> dict[str, Any]:
        """The object, when all is there."""
        return self.response(body, _status(answer), answer)

    def failed(self, body: Body | None, refused: RefusedRequestError) -> dict[str, Any]:
        """The object of one that fails."""
        error = {"code": refused.code or "server_error", "message": refused.message}
        return {**self.response(body, "failed", None), "error": error}

    def _usage(self, body: Body, answer: Answered) -> dict[str, Any]:
        num_prompt, num_new = len(body.asked[0].token_ids), len(answer.token_ids)
        thoughts = "".join(
            part["text"]
            for one in self._output
            if one["type"] == "reasoning"
            for part in one["content"]
        )
        num_thought = len(self._tokenizer(thoughts, add_special_tokens=False)["input_ids"])
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {
                "cached_tokens": answer.counts.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": num_new,
            "output_tokens_details": {"reasoning_tokens": min(num_thought, num_new)},
            "total_tokens": num_prompt + num_new,
        }

    # Its events.

    def begin(self, body: Body) -> bytes:
        """The events before its output."""
        self.has_begun = True
        response = self.response(body, "in_progress", None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def add(self, pieces: Sequence[Piece]) -> bytes:
        """More of its output."""
        events = b""
        for one in pieces:
            if isinstance(one, Call):
                events += self._call(one)
            elif isinstance(one, Thought):
                events += self._thought(one.text)
            else:
                events += self._said(one)
        return events

    def end(self, body: Body, answer: Answered) -> bytes:
        """The events after its output, which has at least a message without text."""
        status = _status(answer)
        has_answer = any(one["type"] != "reasoning" for one in self._output)
        is_cut = status == "incomplete" and bool(self._output)  # in the middle of a thought
        events = b"" if has_answer or is_cut else self._said("")
        events += self._close(status)
        return events + self._event(f"response.{status}", response=self.ended(body, answer))

    def failure(self, refused: RefusedRequestError) -> bytes:
        """The last event of one that fails."""
        told = refused.fields["error"]
        return self._event("error", message=told["message"], code=told["code"], param=told["param"])

    def _thought(self, text: str) -> bytes:
        events = b""
        if not self._thinks:
            events += self._close("completed")
            self._text, self._thinks = "", True
            self._output.append(_reasoning(_new_id("rs"), "in_progress", []))
            events += self._item("added", self._output[-1])
        self._text = (self._text or "") + text
        self._output[-1] = _reasoning(self._item_id, "in_progress", [self._text])
        return events + self._event("response.reasoning_text.delta", **self._place, delta=text)

    def _said(self, text: str) -> bytes:
        events = self._close("completed") if self._thinks else b""
        if self._text is None:
            self._text = ""
            item = _message(_new_id("msg"), "in_progress", "")
            self._output.append(item)
            events += self._item("added", {**item, "content": []})
            events += self._event("response.content_part.added", **self._place, part=_part(""))
        if not text:
            return events
        self._text += text
        self._output[-1] = _message(self._item_id, "in_progress", self._text)
        return events + self._event(
            "response.output_text.delta", **self._place, delta=text, logprobs=[]
        )

    def _close(self, status: str) -> bytes:
        """The events after the text of a message or a thought, if one goes on."""
        text, self._text = self._text, None
        thinks, self._thinks = self._thinks, False
        if text is None:
            return b""
        if thinks:
            self._output[-1] = _reasoning(self._item_id, status, [text])
            done = self._event("response.reasoning_text.done", **self._place, text=text)
            return done + self._item("done", self._output[-1])
        self._output[-1] = _message(self._item_id, status, text)
        return (
            self._event("response.output_text.done", **self._place, text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place, part=_part(text))
            + self._item("done", self._output[-1])
        )

    def _call(self, call: Call) -> bytes:
        events = self._close("completed")
        item = {
            "id": _new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
        }
        self._output.append(item)
        place = {"item_id": self._item_id, "output_index": len(self._output) - 1}
        arguments = "response.function_call_arguments"
        return (
            events
            + self._item("added", {**item, "status": "in_progress", "arguments": ""})
            + self._event(f"{arguments}.delta", **place, delta=call.arguments)
            + self._event(f"{arguments}.done", **place, name=call.name, arguments=call.arguments)
            + self._item("done", item)
        )

    @property
    def _item_id(self) -> str:
        return str(self._output[-1]["id"])

    @property
    def _place(self) -> dict[str, Any]:
        index = len(self._output) - 1
        return {"item_id": self._item_id, "output_index": index, "content_index": 0}

    def _item(self, what: str, item: Mapping[str, Any]) -> bytes:
        index = len(self._output) - 1
        return self._event(f"response.output_item.{what}", output_index=index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        told = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + as_json(told) + b"\n\n"


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"


def _status(answer: Answered) -> str:
    return "incomplete" if answer.finish_reason == "length" else "completed"


def _message(item_id: str, status: str, text: str) -> dict[str, Any]:
    return {
        "id": item_id,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_part(text)],
    }


def _reasoning(item_id: str, status: str, texts: Sequence[str]) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    made = {"id": item_id, "type": "reasoning", "status": status, "summary": []}
    return {**made, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
