"""Reads answers in the form of gpt-oss, harmony: messages on channels, thoughts among them.

Source: the chat template of gpt-oss-20b, and OpenAI's description of the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.files.untrusted_json import parse_object
from ollm_core.text.detokenizer import begun_at_end
from ollm_core.text.thoughts import Thought
from ollm_core.text.tool_calls import CallParser, Piece
from ollm_core.text.tool_forms import ToolForm

OPENING = "<|channel|>final<|message|>"
"""What is written for the model where its answer must begin at once."""
_BODY = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_HEADS = ("<|channel|>", "<|start|>", " to=")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=functions\.([\w.-]+)")
_BETWEEN = "\n\n"  # two messages of text


class HarmonyParser(CallParser):
    """Takes one answer's text, with its control tokens. What is on the channel `analysis` is
    thought, a message to a function that was given is a call, and all else is text.
    """

    def __init__(self, form: ToolForm, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(form, tools)
        self._held = ""
        self._head: str | None = ""
        """Of the message that goes on, when it has ended; None while it is not whole."""
        self._is_first = True
        self._has_told = False  # some text

    def add(self, text: str) -> list[Piece]:
        """What is certain with more of the answer."""
        self._held += text
        told: list[Piece] = []
        if self._is_first:
            begun = self._held.lstrip("\n")
            if any(head.startswith(begun[: len(head)]) for head in _HEADS):
                if not any(begun.startswith(head) for head in _HEADS):
                    return []
                self._head = None
            self._is_first = False
        while True:
            if self._head is None:
                head, body, rest = self._held.partition(_BODY)
                if not body:
                    return told
                self._head, self._held = head, rest
            ends = [place for end in _ENDS if (place := self._held.find(end)) >= 0]
            if not ends:
                return [*told, *self._some()]
            told += self._message(self._held[: min(ends)])
            self._head, self._held = None, self._held[min(ends) :]

    def finish(self) -> list[Piece]:
        """What is left."""
        if self._is_first:
            return [self._held] if self._held else []
        return [] if self._head is None else self._message(self._held)

    @property
    def _function(self) -> str | None:
        """Which one the message calls, of those that were given."""
        found = _FUNCTION.search(self._head or "")
        return found[1] if found and found[1] in self._names else None

    def _some(self) -> list[Piece]:
        """What has come of a message that goes on; of a call, nothing yet."""
        if self._function is not None:
            return []
        count = len(self._held) - max(begun_at_end(self._held, end) for end in _ENDS)
        text, self._held = self._held[:count], self._held[count:]
        return self._spoken(text)

    def _message(self, text: str) -> list[Piece]:
        """What is left of a message, which has ended."""
        if self._function is not None:
            try:
                return [self._call(self._function, parse_object(text.encode(), strict=True))]
            except ValueError:
                pass
        told = self._spoken(text)
        if self._has_told and not self._is_thought:
            self._space = _BETWEEN  # if more is said
        return told

    @property
    def _is_thought(self) -> bool:
        found = _CHANNEL.search(self._head or "")
        return found is not None and found[1] == "analysis"

    def _spoken(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._is_thought:
            return [Thought(text)]
        space, self._space, self._has_told = self._space, "", True
        return [space + text]
