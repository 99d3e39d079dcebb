"""Answers piece by piece, in OpenAI's form: the chunks of a stream."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from ollm_core.serving.openai.answers import Writer
from ollm_core.serving.openai.requests import Kind
from ollm_core.serving.request import FinishReason, NewToken


class Chunks:
    """Makes the chunks of one stream, which share an id. Choices are known by their index."""

    def __init__(
        self, writer: Writer, kind: Kind, *, wants_logprobs: bool, with_usage: bool
    ) -> None:
        """`with_usage`: the last chunk has it, and all others say that they have none."""
        self._writer = writer
        self._kind = kind
        self._wants_logprobs = wants_logprobs
        self._head = writer.head(kind, chunk=True)
        if with_usage:
            self._head["usage"] = None
        self._ends: defaultdict[int, int] = defaultdict(int)

    def first(self, index: int, echo: str = "") -> dict[str, Any] | None:
        """What a choice begins with, if anything: who speaks, or the prompt again."""
        if self._kind == "chat":
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        self._ends[index] = len(echo)
        return self._chunk(index, {"text": echo}) if echo else None

    def token(self, index: int, event: NewToken) -> dict[str, Any] | None:
        """A token; None if there is nothing to tell of it yet."""
        if not self._wants_logprobs or event.logprobs is None:
            return self._chunk(index, self._said(event.text)) if event.text else None
        ids, told = [event.token_id], [event.logprobs]
        if self._kind == "chat":
            logprobs: dict[str, Any] = self._writer.listed(ids, told)
        else:
            logprobs = self._writer.columns(ids, told, self._ends[index])
            self._ends[index] += sum(map(len, logprobs["tokens"]))
        return self._chunk(index, {**self._said(event.text), "logprobs": logprobs})

    def last(self, index: int, text: str, reason: FinishReason | None) -> list[dict[str, Any]]:
        """The end of a choice, after what its text still ends with."""
        end: dict[str, Any] = {"delta": {}} if self._kind == "chat" else {"text": ""}
        chunks = [self._chunk(index, self._said(text))] if text else []
        return [*chunks, self._chunk(index, end, reason)]

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk after all choices have ended."""
        return {**self._head, "choices": [], "usage": usage}

    def _said(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._kind == "chat" else {"text": text}

    def _chunk(
        self, index: int, fields: dict[str, Any], reason: FinishReason | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **fields, "finish_reason": reason}
        return {**self._head, "choices": [choice]}
