"""What is answered, in OpenAI's form: bodies of chat and completions, lines of a batch's output."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.requests import Asked, Kind
from ollm_core.serving.request import TokenLogprobs

_BROKEN = "\ufffd"
"""What a tokenizer decodes a part of a character to."""
_OBJECTS: Mapping[Kind, tuple[str, str]] = {
    "chat": ("chatcmpl", "chat.completion"),
    "completion": ("cmpl", "text_completion"),
}


class Writer:
    """Writes the answers of one model."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        """`model` is the name that bodies give."""
        self._tokenizer = tokenizer
        self._model = model
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        # A tokenizer may leave out the space before a first word: so none comes first.
        self._anchor: list[int] = list(anchor)
        self._before = self._decode(self._anchor)

    def body(self, asked: Asked, answers: Sequence[Answered]) -> dict[str, Any]:
        """The body of the answers to one prompt, none of which failed."""
        prefix, kind = _OBJECTS[asked.kind]
        num_prompt, num_new = len(asked.token_ids), sum(len(one.token_ids) for one in answers)
        choice = self._chat if asked.kind == "chat" else self._completion
        wants_logprobs = asked.sampling.logprobs is not None
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self._model,
            "choices": [
                choice(index, one, wants_logprobs=wants_logprobs)
                for index, one in enumerate(answers)
            ],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_new,
                "total_tokens": num_prompt + num_new,
                "prompt_tokens_details": {
                    "cached_tokens": min(one.counts.num_cached_tokens for one in answers)
                },
            },
            "system_fingerprint": None,
        }

    def _chat(self, index: int, answer: Answered, *, wants_logprobs: bool) -> dict[str, Any]:
        content = [
            {
                **self._told(token_id, one.logprob),
                "top_logprobs": [self._told(*pair) for pair in one.top],
            }
            for token_id, one in zip(answer.token_ids, answer.logprobs, strict=False)
        ]
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": {"content": content, "refusal": None} if wants_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def _completion(self, index: int, answer: Answered, *, wants_logprobs: bool) -> dict[str, Any]:
        return {
            "index": index,
            "text": answer.text,
            "logprobs": self._columns(answer) if wants_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def _columns(self, answer: Answered) -> dict[str, Any]:
        """The older form: a list for each of token, log-probability, the likeliest, and place."""
        tokens = [self._text(token_id) for token_id in answer.token_ids]
        offsets, end = [], 0
        for token in tokens:
            offsets.append(end)
            end += len(token)
        pairs = list(zip(answer.token_ids, answer.logprobs, strict=False))
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for _, one in pairs],
            "top_logprobs": [self._likeliest(*pair) for pair in pairs],
            "text_offset": offsets,
        }

    def _likeliest(self, token_id: int, told: TokenLogprobs) -> dict[str, float]:
        """By their text, the likeliest of those that have the same; the new token among them."""
        found: dict[str, float] = {}
        for one, logprob in (*told.top, (token_id, told.logprob)):
            found.setdefault(self._text(one), logprob)
        return found

    def _told(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        whole = None if _BROKEN in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}

    def _text(self, token_id: int) -> str:
        return self._decode([*self._anchor, token_id])[len(self._before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))


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
