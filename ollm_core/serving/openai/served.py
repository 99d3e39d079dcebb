"""Bodies as a server takes them: several prompts, streams, the prompt again before its answer, and
priorities, beside what a row of a batch has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ollm_core.errors import InputError, UnsupportedError
from ollm_core.files.untrusted_json import show
from ollm_core.serving.model import ServedModel
from ollm_core.serving.openai.fields import SERVED
from ollm_core.serving.openai.limits import MAX_TEXTS, TIERS
from ollm_core.serving.openai.refused import RefusedError, unsupported
from ollm_core.serving.openai.requests import Asked, Kind, Reader
from ollm_core.serving.openai.schemas import check_body
from ollm_core.serving.request import Request, SamplingParams, Score
from ollm_core.serving.structured import Grammars

_STREAM_OPTIONS = {"include_usage", "include_obfuscation", "continuous_usage_stats"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A body, understood."""

    asked: Sequence[Asked]
    """One for each prompt, with the same sampling."""
    prompts: Sequence[str | None]
    """Their texts, where they are told again."""
    stream: bool = False
    with_usage: bool = False
    """Whether the stream ends with it."""
    echo: bool = False
    answers: bool = True
    """False: only the prompts are wanted again, with their log-probabilities."""
    priority: int = 0

    @property
    def kind(self) -> Kind:
        """Chat or completion."""
        return self.asked[0].kind

    @property
    def num_answers(self) -> int:
        """To each prompt."""
        return self.asked[0].sampling.n

    @property
    def scored(self) -> bool:
        """Whether the log-probabilities of the prompts are wanted."""
        return self.echo and self.asked[0].sampling.logprobs is not None

    def requests(self) -> tuple[list[Request], list[Request | None]]:
        """What is to be answered of each prompt (none without answers), and what is to be scored of
        it alone (None where nothing is). An answer scores its prompt, too: it is computed once.
        """
        if self.answers:
            return [
                Request(token_ids=one.token_ids, wanted=self._sampling(one), priority=self.priority)
                for one in self.asked
            ], [None] * len(self.asked)
        scores = [
            Request(
                token_ids=one.token_ids,
                wanted=Score(len(one.token_ids) - 1, top=max(one.sampling.logprobs or 0, 1)),
                priority=self.priority,
                keep=False,
            )
            if self.scored and len(one.token_ids) > 1
            else None
            for one in self.asked
        ]
        return [], scores

    def _sampling(self, asked: Asked) -> SamplingParams:
        if not self.scored:
            return asked.sampling
        return replace(asked.sampling, prompt_logprobs=max(asked.sampling.logprobs or 0, 1))


def read_body(
    reader: Reader,
    model: ServedModel,
    kind: Kind,
    fields: Mapping[str, Any],
    grammars: Grammars | None = None,
) -> Body:
    """What a body asks; `grammars` are for answers that follow a schema. Raises RefusedError, which
    names the field.
    """
    said = {name: value for name, value in fields.items() if value is not None}
    stream = _switch(said, "stream")
    with_usage = _with_usage(said.pop("stream_options", None), stream=stream)
    tier = said.pop("service_tier", "auto")
    if not isinstance(tier, str) or tier not in TIERS:
        raise RefusedError(
            f"service_tier: need one of {', '.join(TIERS)}, have {show(tier)}",
            param="service_tier",
        )
    schema = _schema(said) if kind == "chat" and grammars is not None else None
    echo = kind == "completion" and _switch(said, "echo")
    answers = not (echo and said.get("max_tokens") == 0 and said["max_tokens"] is not False)
    if not answers:
        said["max_tokens"] = 1  # which is not asked for
    texts = _prompts(said) if kind == "completion" else [None]
    asked = []
    for text in texts:
        one = said if kind == "chat" else {**said, "prompt": text}
        asked.append(_checked(reader.read_body(kind, one), model))
        asked[-1] = _following(asked[-1], schema, grammars, said)
    if asked[0].sampling.n * len(asked) > MAX_TEXTS:
        raise RefusedError(
            f"n: need at most {MAX_TEXTS} answers to all prompts, "
            f"have {asked[0].sampling.n * len(asked)}",
            param="n",
        )
    body = Body(
        asked=asked,
        prompts=[text if isinstance(text, str) else None for text in texts],
        stream=stream,
        with_usage=with_usage,
        echo=echo,
        answers=answers,
        priority=TIERS[tier],
    )
    if stream and (body.scored or not answers):
        raise RefusedError(
            "echo: need stream to be false, or no logprobs",
            code="unsupported_parameter",
            param="echo",
        )
    check_body(SERVED[kind], fields)
    return body


def _checked(asked: Asked, model: ServedModel) -> Asked:
    """What the model can answer. Raises RefusedError."""
    most, num_tokens = model.max_positions, len(asked.token_ids)
    if most is not None and num_tokens > most:
        raise RefusedError(
            f"the prompt has {num_tokens} tokens, the model {most} positions",
            code="context_length_exceeded",
        )
    try:
        model.check(Request(token_ids=asked.token_ids, wanted=replace(asked.sampling, n=1)))
    except InputError as error:
        raise RefusedError(error.message, code="invalid_prompt") from error
    return asked


def _schema(said: dict[str, Any]) -> dict[str, Any] | None:
    """What answers are to follow, if anything."""
    wanted = said.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_object", "json_schema"):
        return None
    del said["response_format"]
    if wanted["type"] == "json_object":
        return {"type": "object"}
    told = wanted.get("json_schema")
    schema = told.get("schema") if isinstance(told, dict) else None
    if not isinstance(schema, dict):
        raise RefusedError(
            f"response_format: need json_schema with a schema, have {show(told)}",
            param="response_format",
        )
    return schema


def _following(
    asked: Asked,
    schema: Mapping[str, Any] | None,
    grammars: Grammars | None,
    said: Mapping[str, Any],
) -> Asked:
    """The same, whose answers follow a schema, or that of a call that must come."""
    param = "response_format"
    if asked.tools is not None:
        if schema is not None:
            raise unsupported("response_format: need no tools, or tool_choice 'none'", param)
        schema, param = (asked.tools.schema() if asked.tools.forced else None), "tools"
    if schema is None:
        return asked
    for name in ("ignore_eos", "min_tokens"):
        if said.get(name):
            raise RefusedError(f"{name}: a schema says where the answer ends", param=name)
    try:
        if grammars is None:
            raise UnsupportedError(f"{param}: this server follows no schemas")
        token_ids = [*asked.token_ids, *asked.opening]
        processor = grammars.follow(schema, len(token_ids))
    except InputError as error:
        hint = f"; {error.hint}" if error.hint else ""
        raise RefusedError(f"{error.message}{hint}", param=param) from None
    return replace(
        asked,
        token_ids=token_ids,
        sampling=replace(asked.sampling, shown_token_ids=(), logits_processors=(processor,)),
        form=replace(asked.form, is_bound=True),
    )


def _prompts(said: Mapping[str, Any]) -> list[Any]:
    """Each prompt of a completion: texts, or lists of token ids."""
    prompt = said.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return [prompt]
    if not all(isinstance(one, str | list) for one in prompt):
        return [prompt]  # one, of token ids, or what the reader refuses
    if len(prompt) > MAX_TEXTS:
        raise RefusedError(f"prompt: need at most {MAX_TEXTS}, have {len(prompt)}", param="prompt")
    return prompt


def _switch(said: dict[str, Any], name: str) -> bool:
    value = said.pop(name, False)
    if not isinstance(value, bool):
        raise RefusedError(f"{name}: need true or false, have {show(value)}", param=name)
    return value


def _with_usage(options: Any, *, stream: bool) -> bool:
    """Whether a stream ends with what it took."""
    if options is None:
        return False
    if not isinstance(options, dict) or options.keys() - _STREAM_OPTIONS:
        raise RefusedError(
            f"stream_options: need an object with include_usage, have {show(options)}",
            param="stream_options",
        )
    if not stream:
        raise RefusedError("stream_options: need stream to be true", param="stream_options")
    found = {name: value for name, value in options.items() if value is not None}
    if not all(isinstance(value, bool) for value in found.values()):
        raise RefusedError("stream_options: need true or false", param="stream_options")
    if found.get("continuous_usage_stats"):
        raise RefusedError(
            "stream_options: continuous_usage_stats is not supported",
            code="unsupported_parameter",
            param="stream_options",
        )
    return bool(found.get("include_usage"))
