"""Answers piece by piece, in OpenAI's form: the chunks of a stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.serving.openai.answers import Writer, told_call, told_reason
from ollm_core.serving.openai.requests import Kind
from ollm_core.serving.request import FinishReason, NewToken
from ollm_core.text.answer_form import AnswerForm, Said
from ollm_core.text.tool_calls import Call


class Chunks:
    """Makes the chunks of one stream, which share an id. Choices are known by their index."""

    def __init__(
        self,
        writer: Writer,
        kind: Kind,
        *,
        wants_logprobs: bool,
        with_usage: bool,
        form: AnswerForm | None = None,
        answer_id: str | None = None,
    ) -> None:
        """`with_usage`: the last chunk has it, and all others say that they have none. By
        `form`, thoughts are told as such, and calls, each whole. `answer_id` is that of all chunks;
        None: a new one.
        """
        self._writer = writer
        self._kind = kind
        self._wants_logprobs = wants_logprobs
        self._head = writer.head(kind, answer_id, chunk=True)
        if with_usage:
            self._head["usage"] = None
        self._ends: defaultdict[int, int] = defaultdict(int)
        self._answers: defaultdict[int, Said] = defaultdict(lambda: Said(form or AnswerForm()))

    def first(self, index: int, echo: str = "") -> dict[str, Any] | None:
        """What a choice begins with, if anything: who speaks, or the prompt again."""
        if self._kind == "chat":
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
        self._ends[index] = len(echo)
        return self._chunk(index, {"text": echo}) if echo else None

    def token(self, index: int, event: NewToken) -> list[dict[str, Any]]:
        """A token; nothing if there is nothing to tell of it yet."""
        said = self._pieces(index, event.text)
        if not self._wants_logprobs or event.logprobs is None:
            return [self._chunk(index, one) for one in said]
        ids, told = [event.token_id], [event.logprobs]
        if self._kind == "chat":
            logprobs: dict[str, Any] = self._writer.listed(ids, told)
        else:
            logprobs = self._writer.columns(ids, told, self._ends[index])
            self._ends[index] += sum(map(len, logprobs["tokens"]))
        first, *more = said or [self._said("")]
        chunks = [self._chunk(index, {**first, "logprobs": logprobs})]
        return [*chunks, *(self._chunk(index, one) for one in more)]

    def last(self, index: int, text: str, reason: FinishReason | None) -> list[dict[str, Any]]:
        """The end of a choice, after what its text still ends with."""
        end: dict[str, Any] = {"delta": {}} if self._kind == "chat" else {"text": ""}
        said = self._pieces(index, text, last=True)
        told = told_reason(reason, self._answers[index].calls)
        return [*(self._chunk(index, one) for one in said), self._chunk(index, end, told)]

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk after all choices have ended."""
        return {**self._head, "choices": [], "usage": usage}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """The same as one object, when all has been told: `choices` are those of one, whose calls
        have other ids.
        """
        told = []
        for choice in choices:
            message = dict(choice["message"])
            if calls := self._answers[choice["index"]].calls:
                message["tool_calls"] = [told_call(call) for call in calls]
            told.append({**choice, "message": message})
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": told, "usage": dict(usage)}

    def _said(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._kind == "chat" else {"text": text}

    def _pieces(self, index: int, text: str, *, last: bool = False) -> list[dict[str, Any]]:
        """What a choice goes on with."""
        answer = self._answers[index]
        told: list[dict[str, Any]] = []
        number = len(answer.calls)
        for piece in answer.add(text, last=last):
            if isinstance(piece, Call):
                told.append({"delta": {"tool_calls": [{"index": number, **told_call(piece)}]}})
                number += 1
            elif isinstance(piece, str):
                told.append(self._said(piece))
            else:
                told.append({"delta": {"reasoning_content": piece.text}})
        return told

    def _chunk(
        self, index: int, fields: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, **fields, "finish_reason": reason}
        return {**self._head, "choices": [choice]}
