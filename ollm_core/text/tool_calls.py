"""Finds calls of functions in an answer as it grows; the rest is its text."""

from __future__ import annotations

import json
import re
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_parsing import ResponseParser, parse_response

from ollm_core.files.untrusted_json import parse_object
from ollm_core.text.thoughts import Thought
from ollm_core.text.tool_forms import ToolForm

_ID_CHARS = string.ascii_letters + string.digits
_PYTHON_TAG = "<|python_tag|>"
_NOWHERE = {"start_anchor": "\0"}
"""Answers are looked at without their prompt."""


def new_call_id() -> str:
    """Nine letters and digits: chat templates of Mistral take no other."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(9))


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model wants called."""

    name: str
    arguments: str
    """A JSON object."""
    call_id: str = field(default_factory=new_call_id)


Piece = str | Call | Thought
"""A part of an answer: more of its text, a call, or a thought."""


class CallParser(ABC):
    """Takes one answer's text in pieces. What may be the beginning of a call is held back."""

    def __init__(self, form: ToolForm, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools` are those that were given, in OpenAI's form: a call of another one is text."""
        self._form = form
        self._tools: list[Any] = [dict(tool) for tool in tools]
        self._names = {str(tool["function"]["name"]) for tool in tools}
        self._has_called = False
        self._space = ""  # the last of the text: none is told around calls

    @abstractmethod
    def add(self, text: str) -> list[Piece]:
        """What is certain with more of the answer."""

    @abstractmethod
    def finish(self) -> list[Piece]:
        """What is left."""

    def _told(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same without the white space around calls."""
        told: list[Piece] = []
        for piece in pieces:
            if not isinstance(piece, str):
                self._space, self._has_called = "", True
                told.append(piece)
                continue
            text = self._space + piece
            kept = text.rstrip()
            self._space = text[len(kept) :]
            if kept:
                told.append(kept.lstrip() if self._has_called else kept)
        return told

    def _rest(self) -> list[Piece]:
        """White space that ends an answer without calls."""
        space, self._space = self._space, ""
        return [] if self._has_called or not space else [space]

    def _call(self, name: object, arguments: object) -> Call:
        """Raises ValueError if it is none of the functions that were given."""
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            raise ValueError
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))


class MarkedCalls(CallParser):
    """Calls between marks, found and read by transformers."""

    def __init__(self, form: ToolForm, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(form, tools)
        as_it_is = {"content": "text", "content_args": {"strip": False}, "repeats": True}
        between = {"open": form.open, **as_it_is}
        if form.close is not None:
            between["close"] = form.close
        self._parser = ResponseParser(
            {**_NOWHERE, "fields": {"call": between, "text": as_it_is}}, prefix=""
        )
        self._template = {
            **_NOWHERE,
            "fields": {"calls": {**(form.field or {}), "repeats": True}},
        }
        self._is_closed = True

    def add(self, text: str) -> list[Piece]:
        """What is certain with more of the answer."""
        return self._told(self._pieces(self._parser.feed(text)))

    def finish(self) -> list[Piece]:
        """What is left."""
        _, events = self._parser.finalize()
        return [*self._told(self._pieces(events, last=True)), *self._rest()]

    def _pieces(self, events: Sequence[Mapping[str, Any]], *, last: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        for number, event in enumerate(events):
            if event["field"] == "text":
                if event["type"] == "region_chunk":
                    pieces.append(event["text"])
            elif event["type"] == "region_close":
                is_cut = last and number == len(events) - 1
                close = "" if is_cut else self._form.close or ""
                pieces += self._calls(self._form.open + str(event["value"]) + close)
        return pieces

    def _calls(self, text: str) -> list[Piece]:
        """The calls of a text with their marks; the text if they are none."""
        try:
            found = parse_response(text, self._template, prefix="", tools=self._tools)["calls"]
            calls = [call for one in found for call in (one if isinstance(one, list) else [one])]
            return [
                self._call(one["function"]["name"], one["function"]["arguments"]) for one in calls
            ]
        except (ValueError, LookupError, TypeError, RecursionError):
            return [text]


class BareCalls(CallParser):
    """Answers that are a JSON object from their beginning on: calls, or else the text."""

    def __init__(self, form: ToolForm, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(form, tools)
        self._held = ""
        self._is_text = False

    def add(self, text: str) -> list[Piece]:
        """What is certain with more of the answer."""
        if not self._is_text:
            self._held += text
            begun = self._held.lstrip()
            if not begun or begun[0] in "{[" or begun.startswith(_PYTHON_TAG[: len(begun)]):
                return []
            self._is_text, text = True, self._held
        return self._told([text] if text else [])

    def finish(self) -> list[Piece]:
        """What is left."""
        if self._is_text:
            return self._rest()
        pieces: list[Piece] = [self._held] if self._held else []
        text = self._held.strip().removeprefix(_PYTHON_TAG).strip()
        if self._form.in_list:
            text = text.removeprefix("[").removesuffix("]").strip()
        for parts in ([text], re.split(r";\s*(?=\{)", text)):
            try:
                pieces = [self._read(part) for part in parts]
                break
            except ValueError:
                continue
        return [*self._told(pieces), *self._rest()]

    def _read(self, text: str) -> Call:
        found = parse_object(text.encode(), strict=True)
        return self._call(found.get("name"), found.get(self._form.arguments))
