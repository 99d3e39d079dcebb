"""`/v1/systemone`: typed decisions in the request form of transformers' server. Nothing is decoded.

Source: `transformers.cli.serving.systemone` and `transformers.decision`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ollm_core.files.untrusted_json import show
from ollm_core.server.answering import collected, tell
from ollm_core.server.client import Client
from ollm_core.server.service import Service
from ollm_core.serving.asking.decisions import Decision, decisions
from ollm_core.serving.asking.questions import check_length
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.schemas import (
    OBJECT,
    TEXT,
    Field,
    Fields,
    any_of,
    check_body,
    check_names,
    ignored,
    one_of,
)
from ollm_core.serving.request import Choices, Request

MAX_QUESTIONS = 256
FIELDS: Fields = {
    "state": Field(any_of(TEXT, OBJECT, {"type": "array"}), required=True),
    "questions": Field(
        {"type": "object", "minProperties": 1, "maxProperties": MAX_QUESTIONS}, required=True
    ),
    "assets": Field(one_of([], {}, "", 0, False)),
    **ignored("model"),
}


class Deciding:
    """Answers all questions of a body, each with a probability for each of its options."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, client: Client) -> None:
        """Raises what is to be told to the client, and ClientGoneError."""
        fields = await client.read_object(self._service.options.max_body_bytes)
        made = await client.unless_gone(self._service.read(lambda: self._decisions(fields)))
        requests = [
            Request(token_ids=one.token_ids, wanted=Choices(one.label_ids), keep=False)
            for one in made
        ]
        found = {}
        for one, [answer] in zip(
            made, await collected(client, self._service, requests), strict=True
        ):
            assert answer.scored is not None
            found[one.question.name] = one.answer(answer.scored.logprobs)
        num_tokens = sum(len(one.token_ids) for one in made)
        usage = {"input_tokens": num_tokens, "output_tokens": 0}
        await tell(client, {"model": self._service.name, "answers": found, "usage": usage})

    def _decisions(self, fields: Mapping[str, Any]) -> list[Decision]:
        check_names(FIELDS, {name: one for name, one in fields.items() if one is not None})
        if fields.get("assets"):
            raise RefusedError("assets: this model reads text alone", param="assets")
        state, questions = fields.get("state"), fields.get("questions")
        if not isinstance(state, str | dict | list):
            raise RefusedError(
                f"state: need a text, an object or a list, have {show(state)}", param="state"
            )
        if not isinstance(questions, dict) or not 0 < len(questions) <= MAX_QUESTIONS:
            raise RefusedError(
                f"questions: need an object with 1 to {MAX_QUESTIONS} questions by their names",
                param="questions",
            )
        check_body(FIELDS, fields)
        text = state if isinstance(state, str) else json.dumps(state, ensure_ascii=False)
        made = decisions(self._service.tokenizer, text, questions)
        check_length([one.token_ids for one in made], self._service.served.max_positions)
        return made
