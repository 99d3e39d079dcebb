"""Typed questions answered as probabilities: transformers' decisions (`transformers.decision`), one
prompt each, without decoding.

The request shapes, the prompt and the form of the answers are transformers' own; the text is made
token ids by this library, so that a document cannot spell control tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2.sandbox

from ollm_core.errors import InputError, UnsupportedError, words
from ollm_core.text.prompts import PromptEncoder

MAX_QUESTIONS = 4096
_YES_NO = ("yes_no", "yes/no", "bool")
"""What people call transformers' "noul"."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A question, its prompt, and the token ids that stand for its options."""

    question: Any
    """transformers' Question."""
    token_ids: list[int]
    label_ids: tuple[int, ...]

    def answer(self, logprobs: Sequence[float]) -> dict[str, Any]:
        """transformers' form of the answer, of the log-probability of each label."""
        highest = max(logprobs)
        weights = [math.exp(one - highest) for one in logprobs]
        found: dict[str, Any] = self.question.answer([one / sum(weights) for one in weights])
        return found


def decisions(tokenizer: Any, document: str, questions: Mapping[str, Any]) -> list[Decision]:
    """One for each of `questions`, by name: {"type": "noul" (or "yes_no") | "choice" | "score",
    "instructions": ..., "criteria": ...}. Raises InputError, with a valid example, for others,
    UnsupportedError where transformers has no decisions.
    """
    parse, label_token_ids, config, template = _of_transformers()
    if not isinstance(questions, Mapping) or not questions:
        raise InputError(
            "the questions: need an object with at least one question by its name",
            hint='{"spam": {"type": "noul", "instructions": "Is this spam?"}}',
        )
    if len(questions) > MAX_QUESTIONS:
        raise InputError(f"questions: need at most {MAX_QUESTIONS}, have {len(questions)}")
    try:
        parsed = parse({name: _named(one) for name, one in questions.items()}, config)
    except ValueError as error:
        raise InputError(words(error)) from error
    encoder = PromptEncoder(tokenizer, options={"enable_thinking": False})
    texts = [template.render(state=document, question=one) for one in parsed]
    found = []
    for one, token_ids in zip(parsed, encoder.of_texts(texts), strict=True):
        try:
            labels = label_token_ids(tokenizer, tuple(one.labels))
        except ValueError as error:
            raise InputError(f"question {one.name!r}: {words(error)}") from error
        found.append(Decision(one, token_ids, tuple(labels)))
    return found


def _named(question: Any) -> Any:
    if isinstance(question, Mapping) and question.get("type") in _YES_NO:
        return {**question, "type": "noul"}
    return question


def _of_transformers() -> tuple[Any, Any, Any, jinja2.Template]:
    """Its parser of questions, its labels' ids, its default config, and its prompt."""
    try:
        from transformers.decision import (
            DECISION_PROMPT,
            DecisionConfig,
            label_token_ids,
            parse_questions,
        )
    except ImportError as error:
        import transformers

        raise UnsupportedError(
            f"transformers {transformers.__version__} has no decisions",
            hint="pip install -U transformers",
        ) from error
    # As transformers compiles its templates.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    environment.filters["tojson"] = _json
    return (
        parse_questions,
        label_token_ids,
        DecisionConfig(),
        environment.from_string(DECISION_PROMPT),
    )


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
