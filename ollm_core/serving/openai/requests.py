"""What is asked, in OpenAI's words: lines of a batch, and the bodies of chat and of completions. No
network.

Sources: the batch, chat and completions pages of OpenAI's API reference, and the additional
sampling parameters of vLLM's OpenAI-compatible server. Rows are text of anybody: what they spell of
control tokens is plain characters, and no field lets them write one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ollm_core.errors import ConfigError, InputError
from ollm_core.files.untrusted_json import parse_object, show
from ollm_core.serving.openai.fields import ROWS
from ollm_core.serving.openai.limits import MAX_ANSWERS, MAX_ID_CHARS, MAX_LOGPROBS, WORD
from ollm_core.serving.openai.messages import name_results, read_message
from ollm_core.serving.openai.refused import (
    RefusedError,
    check_text,
    is_number,
    is_unicode,
    switch,
    unsupported,
)
from ollm_core.serving.openai.schemas import check_body, check_names
from ollm_core.serving.openai.tools import ToolUse, read_tools
from ollm_core.serving.request import SamplingParams
from ollm_core.text.answer_form import AnswerForm
from ollm_core.text.chat import encode_chat, encode_text
from ollm_core.text.templates import ChatTemplate

Kind = Literal["chat", "completion"]
KINDS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
"""By the url of a row."""

_AS_THEY_ARE = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "stop", "seed",
    "stop_token_ids", "min_tokens",
)  # fmt: skip
_SWITCHES = ("ignore_eos", "include_stop_str_in_output")
_WORD = re.compile(WORD)
_PLAIN = AnswerForm()


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a batch that names itself."""

    custom_id: str
    fields: Mapping[str, Any]
    """All of them, not looked at yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What holds where a body says nothing."""

    max_tokens: int = 256
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A body, understood."""

    kind: Kind
    token_ids: Sequence[int]
    """The prompt."""
    sampling: SamplingParams
    tools: ToolUse | None = None
    """Functions that the answers may call."""
    form: AnswerForm = _PLAIN
    """How the model writes them."""
    opening: Sequence[int] = ()
    """What is written for the model where an answer must follow a grammar from its first token on.
    """


def read_row(line: bytes) -> Row:
    """A line of a batch, of which only the name is looked at. Raises RefusedError with the code
    invalid_json_line or missing_custom_id.
    """
    try:
        fields = parse_object(line, strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise RefusedError(f"the line {_begun(reason)}", code="invalid_json_line") from None
    name = fields.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_CHARS or not is_unicode(name):
        raise RefusedError(
            f"custom_id: need a text of 1 to {MAX_ID_CHARS} characters, have {show(name)}",
            code="missing_custom_id",
            param="custom_id",
        )
    return Row(name, fields)


class Reader:
    """Understands rows for one model."""

    def __init__(self, tokenizer: Any, defaults: Defaults | None = None) -> None:
        """Raises ConfigError for a chat template that is none."""
        self._tokenizer = tokenizer
        self._template = ChatTemplate.of(tokenizer)
        self._for_tools = ChatTemplate.of(tokenizer, for_tools=True)
        self._defaults = defaults or Defaults()

    def read(self, row: Row) -> Asked:
        """What a row asks. Raises RefusedError."""
        fields = row.fields
        if unknown := fields.keys() - {"custom_id", "method", "url", "body"}:
            raise _unknown(min(unknown), "the row")
        if fields.get("method", "POST") != "POST":
            raise RefusedError(
                f"method: need 'POST', have {show(fields['method'])}", param="method"
            )
        url = fields.get("url")
        kind = KINDS.get(url) if isinstance(url, str) else None
        if kind is None:
            raise RefusedError(
                f"url: need {' or '.join(KINDS)}, have {show(url)}", code="invalid_url", param="url"
            )
        body = fields.get("body")
        if not isinstance(body, dict):
            raise RefusedError(f"body: need a JSON object, have {show(body)}", param="body")
        asked = self.read_body(kind, body)
        if asked.tools is not None and asked.tools.forced:
            raise unsupported("tool_choice: need 'auto' or 'none' in a row", "tool_choice")
        check_body(ROWS[kind], body)
        return asked

    def read_body(self, kind: Kind, body: Mapping[str, Any]) -> Asked:
        """What a body asks. A field that is null counts as one that is not there. Raises
        RefusedError, which names the field.
        """
        said = {name: value for name, value in body.items() if value is not None}
        check_names(ROWS[kind], said)
        sampling = self._sampling(kind, said)
        try:
            if kind == "chat":
                return self._chat(said, sampling)
            return Asked(kind, self._text(said.get("prompt")), sampling)
        except RefusedError:
            raise
        except (InputError, ConfigError) as error:  # of the template, or of control tokens
            raise RefusedError(error.message, code="invalid_prompt") from error

    def _sampling(self, kind: Kind, said: Mapping[str, Any]) -> SamplingParams:
        chosen: dict[str, Any] = {"temperature": self._defaults.temperature}
        chosen |= {name: said[name] for name in _AS_THEY_ARE if name in said}
        for name in _SWITCHES:
            if name in said:
                chosen[name] = switch(name, said[name])
        for name in ("stop", "stop_token_ids"):
            value = chosen.get(name, [])
            if not isinstance(value, list) and not (name == "stop" and isinstance(value, str)):
                raise RefusedError(f"{name}: need a list, have {show(value)}", param=name)
        if not all(is_number(one) for one in chosen.get("stop_token_ids", [])):
            raise RefusedError("stop_token_ids: need token ids", param="stop_token_ids")
        limits = {said[one] for one in _limits(said)}
        if len(limits) > 1:
            raise RefusedError(
                "max_completion_tokens and max_tokens say different things",
                param="max_completion_tokens",
            )
        chosen["max_tokens"] = limits.pop() if limits else self._defaults.max_tokens
        chosen["logprobs"] = _logprobs(kind, said)
        try:
            sampling = SamplingParams(**chosen)
            for text in sampling.stops:
                check_text("stop", text)
        except RefusedError:
            raise
        except InputError as error:
            raise RefusedError(error.message, param=error.message.split()[0].rstrip(":")) from None
        if sampling.n > MAX_ANSWERS:
            raise RefusedError(f"n: need at most {MAX_ANSWERS}, have {sampling.n}", param="n")
        return sampling

    # The prompt.

    def _text(self, prompt: Any) -> Sequence[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str):
            check_text("prompt", prompt)
            return encode_text(self._tokenizer, prompt)
        if isinstance(prompt, list) and all(is_number(one) for one in prompt):
            return prompt
        if isinstance(prompt, list) and all(isinstance(one, str | list) for one in prompt):
            raise RefusedError(
                f"prompt: need one in a row, have {len(prompt)}",
                code="unsupported_parameter",
                param="prompt",
            )
        raise RefusedError(
            f"prompt: need a text or a list of token ids, have {show(prompt)}", param="prompt"
        )

    def _chat(self, said: Mapping[str, Any], sampling: SamplingParams) -> Asked:
        template = self._for_tools if said.get("tools") else self._template
        if template is None:
            raise RefusedError(
                "the model has no chat template: use /v1/completions", code="no_chat_template"
            )
        messages = said.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RefusedError(
                f"messages: need a list of at least one, have {show(messages)}", param="messages"
            )
        shown = [read_message(number, one) for number, one in enumerate(messages)]
        name_results(shown)
        if any("tool_calls" in one for one in shown) and not template.knows("tool_calls"):
            raise unsupported(
                "messages: the model's chat template does not take tool_calls", "messages"
            )
        use = read_tools(said, template.source)
        variables = self._variables(said, template)
        tools = () if use is None else use.tools
        token_ids = encode_chat(self._tokenizer, template, shown, variables, tools=tools)
        form = AnswerForm.after(self._tokenizer, template, token_ids)
        opening = form.opening
        if use is not None:
            form = replace(form, calls=use.form, tools=use.forced or use.tools)
            opening += use.opening
        sampling = sampling.showing(form.control_ids(self._tokenizer))
        opening_ids = self._tokenizer(opening, add_special_tokens=False)["input_ids"]
        return Asked("chat", token_ids, sampling, use, form, opening_ids)

    def _variables(self, said: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
        """What the template is told beside messages. It must know each, and none may be a text that
        could spell a control token.
        """
        found = said.get("chat_template_kwargs", {})
        if not isinstance(found, dict):
            raise RefusedError(
                f"chat_template_kwargs: need a JSON object, have {show(found)}",
                param="chat_template_kwargs",
            )
        param = {name: "chat_template_kwargs" for name in found}
        if "reasoning_effort" in said:
            found = {**found, "reasoning_effort": said["reasoning_effort"]}
            param["reasoning_effort"] = "reasoning_effort"
        for name, value in found.items():
            is_own = name in ("messages", "tools", "documents", "add_generation_prompt")
            if not _WORD.fullmatch(name) or is_own or name in template.variables:
                raise RefusedError(
                    f"chat_template_kwargs: cannot set {show(name)}", param=param[name]
                )
            if not template.knows(name):
                raise RefusedError(
                    f"{name}: the model's chat template does not ask for it",
                    code="unsupported_parameter",
                    param=param[name],
                )
            if not isinstance(value, bool | int) and not (
                isinstance(value, str) and _WORD.fullmatch(value)
            ):
                raise RefusedError(
                    f"{name}: need true, false, a whole number or a word, have {show(value)}",
                    param=param[name],
                )
        return dict(found)


def _limits(said: Mapping[str, Any]) -> list[str]:
    """The fields that say how long an answer may be. Raises RefusedError for what is no number."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in said]
    for name in names:
        if not is_number(said[name]) or said[name] < 1:
            raise RefusedError(
                f"{name}: need a whole number of at least 1, have {show(said[name])}", param=name
            )
    return names


def _logprobs(kind: Kind, said: Mapping[str, Any]) -> int | None:
    """How many of the most likely tokens to tell. Chat has a switch and a number, completions one
    number.
    """
    name, number = "logprobs", said.get("logprobs")
    if kind == "chat":
        wanted = switch("logprobs", said.get("logprobs", False))
        name, number = "top_logprobs", said.get("top_logprobs", 0 if wanted else None)
        if number is not None and not wanted:
            raise RefusedError("top_logprobs: need logprobs to be true", param="top_logprobs")
    if number is not None and (not is_number(number) or number > MAX_LOGPROBS):
        raise RefusedError(
            f"{name}: need a whole number from 0 to {MAX_LOGPROBS}, have {show(number)}", param=name
        )
    return number


def _unknown(name: str, where: str) -> RefusedError:
    return RefusedError(
        f"{show(name)} in {where} is not known", code="unknown_parameter", param=name[:100]
    )


def _begun(reason: str) -> str:
    """A reason of the parser, as the rest of a sentence."""
    return reason if reason.startswith("must ") else f"is {reason}"
