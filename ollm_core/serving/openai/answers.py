"""What is answered, in OpenAI's form: bodies of chat and completions, lines of a batch's output."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.requests import Asked, Kind
from ollm_core.serving.request import FinishReason, TokenLogprobs
from ollm_core.text.answer_form import Said
from ollm_core.text.tool_calls import Call

_BROKEN = "\ufffd"
"""What a tokenizer decodes a part of a character to."""
_OBJECTS: Mapping[Kind, tuple[str, str]] = {
    "chat": ("chatcmpl", "chat.completion"),
    "completion": ("cmpl", "text_completion"),
}


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is told again before the answers to it."""

    text: str
    token_ids: Sequence[int]
    told: Sequence[TokenLogprobs | None] = ()
    """Of each token, where they were asked for: nothing comes before the first one."""


class Writer:
    """Writes the answers of one model."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        """`model` is the name that bodies give."""
        self._tokenizer = tokenizer
        self._model = model
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        # A tokenizer may leave out the space before a first word: so none comes first.
        self._anchor: list[int] = list(anchor)
        self._before = self.decode(self._anchor)

    def body(
        self, asked: Asked, answers: Sequence[Answered], echo: Echo | None = None
    ) -> dict[str, Any]:
        """The body of the answers to one prompt, none of which failed; of completions, each after
        the `echo`, if there is one.
        """
        return {
            **self.head(asked.kind),
            "choices": [
                self._chat(index, one, asked)
                if asked.kind == "chat"
                else self._completion(index, one, asked, echo)
                for index, one in enumerate(answers)
            ],
            "usage": usage([asked], [answers]),
        }

    def head(
        self, kind: Kind, answer_id: str | None = None, *, chunk: bool = False
    ) -> dict[str, Any]:
        """The fields that all answers have, and all chunks of one: an id among them, a new one
        where none is given.
        """
        _, name = _OBJECTS[kind]
        return {
            "id": answer_id or new_answer_id(kind),
            "object": f"{name}.chunk" if chunk and kind == "chat" else name,
            "created": int(time.time()),
            "model": self._model,
            "system_fingerprint": None,
        }

    def _chat(self, index: int, answer: Answered, asked: Asked) -> dict[str, Any]:
        said = Said(asked.form)
        said.add(answer.text, last=True)
        text = (said.text or None) if said.calls else said.text
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if said.thoughts:
            message["reasoning_content"] = said.thoughts
        if said.calls:
            message["tool_calls"] = [told_call(call) for call in said.calls]
        wants_logprobs = asked.sampling.logprobs is not None
        return {
            "index": index,
            "message": message,
            "logprobs": self.listed(answer.token_ids, answer.logprobs) if wants_logprobs else None,
            "finish_reason": told_reason(answer.finish_reason, said.calls),
        }

    def _completion(
        self, index: int, answer: Answered, asked: Asked, echo: Echo | None
    ) -> dict[str, Any]:
        wants_logprobs = asked.sampling.logprobs is not None
        echo = echo or Echo("", ())
        token_ids, told = [*echo.token_ids, *answer.token_ids], [*echo.told, *answer.logprobs]
        return {
            "index": index,
            "text": echo.text + answer.text,
            "logprobs": self.columns(token_ids, told) if wants_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def listed(
        self, token_ids: Sequence[int], told: Sequence[TokenLogprobs]
    ) -> dict[str, list[dict[str, Any]] | None]:
        """The log-probabilities of a chat's tokens."""
        content = [
            {
                **self._told(token_id, one.logprob),
                "top_logprobs": [self._told(*pair) for pair in one.top],
            }
            for token_id, one in zip(token_ids, told, strict=False)
        ]
        return {"content": content, "refusal": None}

    def columns(
        self, token_ids: Sequence[int], told: Sequence[TokenLogprobs | None], begin: int = 0
    ) -> dict[str, Any]:
        """Those of a completion, in the older form: a list for each of token, log-probability, the
        likeliest, and place, the first of which is `begin`.
        """
        tokens = [self._text(token_id) for token_id in token_ids]
        offsets, end = [], begin
        for token in tokens:
            offsets.append(end)
            end += len(token)
        pairs = list(zip(token_ids, told, strict=False))
        return {
            "tokens": tokens,
            "token_logprobs": [one and one.logprob for _, one in pairs],
            "top_logprobs": [self._likeliest(*pair) for pair in pairs],
            "text_offset": offsets,
        }

    def _likeliest(self, token_id: int, told: TokenLogprobs | None) -> dict[str, float] | None:
        """By their text, the likeliest of those that have the same; the new token among them."""
        if told is None:
            return None
        found: dict[str, float] = {}
        for one, logprob in (*told.top, (token_id, told.logprob)):
            found.setdefault(self._text(one), logprob)
        return found

    def _told(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        whole = None if _BROKEN in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}

    def _text(self, token_id: int) -> str:
        return self.decode([*self._anchor, token_id])[len(self._before) :]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, control tokens too."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def new_answer_id(kind: Kind) -> str:
    """That nobody can guess."""
    return f"{_OBJECTS[kind][0]}-{secrets.token_hex(16)}"


def told_call(call: Call) -> dict[str, Any]:
    """A call in the form of chats."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.call_id, "type": "function", "function": function}


def told_reason(reason: FinishReason | None, calls: Sequence[Call]) -> str | None:
    """Why an answer has ended; one that has called something waits for what that gives."""
    return "tool_calls" if calls and reason == "stop" else reason


def usage(asked: Sequence[Asked], answers: Sequence[Sequence[Answered]]) -> dict[str, Any]:
    """What prompts and all answers to each took."""
    num_prompt = sum(len(one.token_ids) for one in asked)
    num_new = sum(len(one.token_ids) for several in answers for one in several)
    cached = (min(one.counts.num_cached_tokens for one in several) for several in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(cached)},
    }


def answer_line(custom_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a batch's output."""
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": {"status_code": 200, "request_id": secrets.token_hex(16), "body": dict(body)},
        "error": None,
    }


def error_line(
    custom_id: str | None, line: int, code: str, message: str, param: str | None = None
) -> dict[str, Any]:
    """A line of a batch's error file; `line` is that of the input, from 1."""
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": custom_id,
        "response": None,
        "error": {"code": code, "message": message, "param": param, "line": line},
    }
