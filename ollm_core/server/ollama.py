"""Ollama's addresses, for its clients: `/api/version`, `/api/tags`, `/api/show`, `/api/ps`,
`/api/chat` and `/api/generate`.

Source: docs/api.md of Ollama. What a body asks is put into OpenAI's words, and understood there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ollm_core.files.untrusted_json import parse_object, show
from ollm_core.server.answering import check
from ollm_core.server.client import Client, as_json
from ollm_core.server.errors import ClientGoneError, refusal
from ollm_core.server.meter import Stopwatch
from ollm_core.server.service import Service
from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.fields import SAMPLING, SHORT, TOOL, message
from ollm_core.serving.openai.limits import MAX_TOOLS
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.requests import Kind
from ollm_core.serving.openai.schemas import (
    ANYTHING,
    OBJECT,
    SWITCH,
    TEXT,
    Field,
    Fields,
    any_of,
    check_body,
    check_names,
    ignored,
    list_of,
    nullable,
    object_of,
    one_of,
    only,
)
from ollm_core.serving.openai.served import Body
from ollm_core.text.answer_form import AnswerForm, Said
from ollm_core.text.templates import ChatTemplate
from ollm_core.text.thoughts import Thought
from ollm_core.text.tool_calls import Call

API_VERSION = "0.6.4"
"""Of Ollama, whose addresses these are: some clients ask for at least so much."""
KEEP_ALIVE_SECONDS = 5.0
_STREAM = "application/x-ndjson"
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""Ollama's own, where a body says nothing."""
_SAMPLING = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "seed": "seed", "stop": "stop", "repeat_penalty": "repetition_penalty",
}  # fmt: skip
_IGNORED_OPTIONS = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "low_vram", "vocab_only", "use_mmap",
    "use_mlock", "num_thread", "num_keep", "numa", "f16_kv", "logits_all",
)  # fmt: skip
"""Of how Ollama runs a model."""
_OPTIONS = object_of(
    {
        **{name: nullable(SAMPLING[other]) for name, other in _SAMPLING.items()},
        "num_predict": {"type": "integer"},
        "presence_penalty": one_of(0, None),
        "frequency_penalty": one_of(0, None),
        **dict.fromkeys(_IGNORED_OPTIONS, ANYTHING),
    }
)
_BOTH: Fields = {
    "format": Field(any_of(one_of("", "json"), OBJECT)),
    "stream": Field(SWITCH),
    "options": Field(_OPTIONS),
    "images": only([]),
    "suffix": only(""),
    "template": only(""),
    "think": Field(any_of(SWITCH, one_of("low", "medium", "high"))),
    "context": only([]),
    "logprobs": only(False),
    **ignored("model", "keep_alive"),
}
FIELDS: Mapping[Kind, Fields] = {
    "chat": {
        "messages": Field(
            list_of(message({"name": nullable(SHORT), "tool_name": nullable(SHORT)}))
        ),
        "tools": Field(list_of(TOOL, 0, MAX_TOOLS)),
        **_BOTH,
    },
    "completion": {
        "prompt": Field(TEXT),
        "system": Field(TEXT),
        "raw": Field(SWITCH),
        **_BOTH,
    },
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A body in OpenAI's words."""

    kind: Kind
    fields: Mapping[str, Any]
    stream: bool
    is_empty: bool
    """Only whether the model is there is asked."""


def understood(kind: Kind, body: Mapping[str, Any], template: ChatTemplate | None) -> Wanted:
    """What a body of `/api/chat` or `/api/generate` (a completion) asks. Raises RefusedError."""
    said = {name: value for name, value in body.items() if value is not None}
    check_names(FIELDS[kind], said)
    stream, raw = said.get("stream", True), said.get("raw", False)
    for name, value in (("stream", stream), ("raw", raw)):
        if not isinstance(value, bool):
            raise RefusedError(f"{name}: need true or false, have {show(value)}", param=name)
    fields = {**_sampling(said.get("options", {})), **_format(said.get("format", ""))}
    fields |= _thinking(said.get("think"), template)
    check_body(FIELDS[kind], body)
    if kind == "chat":
        messages = said.get("messages", [])
        if isinstance(messages, list):
            messages = [_message(one) for one in messages]
        if "tools" in said:
            fields["tools"] = said["tools"]
        return Wanted("chat", {**fields, "messages": messages}, stream, messages == [])
    prompt, system = said.get("prompt", ""), said.get("system", "")
    if not isinstance(prompt, str) or not isinstance(system, str):
        raise RefusedError("prompt and system: need texts", param="prompt")
    if raw or template is None:
        if system:
            raise RefusedError("system: need a chat template, have none", param="system")
        return Wanted("completion", {**fields, "prompt": prompt}, stream, not prompt)
    messages = [{"role": "system", "content": system}] if system else []
    messages = [*messages, {"role": "user", "content": prompt}]
    return Wanted("chat", {**fields, "messages": messages}, stream, not prompt)


def _message(message: Any) -> Any:
    """In OpenAI's words: what a function gave has its name under another one."""
    if not isinstance(message, dict) or "tool_name" not in message:
        return message
    renamed = {"tool_name": "name"}
    return {renamed.get(name, name): value for name, value in message.items()}


def _format(wanted: Any) -> dict[str, Any]:
    """ "json", or a JSON schema."""
    if wanted == "":
        return {}
    if wanted == "json":
        return {"response_format": {"type": "json_object"}}
    if not isinstance(wanted, dict):
        raise RefusedError(f"format: need 'json' or a schema, have {show(wanted)}", param="format")
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": wanted}}}


def _thinking(wanted: Any, template: ChatTemplate | None) -> dict[str, Any]:
    """Whether the model is to think, or how much, where its template lets one say so."""
    is_level = isinstance(wanted, str)
    thinks = template is not None and AnswerForm.of(template.source).has_thoughts
    if wanted and not thinks:
        raise RefusedError("think: the model's chat template knows of no thoughts", param="think")
    if template is None or wanted is None:
        return {}
    if is_level and template.knows("reasoning_effort"):
        return {"reasoning_effort": wanted}
    if template.knows("enable_thinking"):
        return {"chat_template_kwargs": {"enable_thinking": bool(wanted)}}
    return {}


def _sampling(options: Any) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise RefusedError(f"options: need an object, have {show(options)}", param="options")
    fields: dict[str, Any] = dict(_DEFAULTS)
    for name, value in options.items():
        if name in _SAMPLING:
            fields[_SAMPLING[name]] = value
        elif name == "num_predict":
            if not isinstance(value, int) or isinstance(value, bool):
                raise RefusedError(f"num_predict: need a whole number, have {show(value)}")
            if value > 0:  # else as much as this server gives
                fields["max_tokens"] = value
        elif name in ("presence_penalty", "frequency_penalty"):
            fields[name] = value  # refused unless it is 0
        elif name not in _IGNORED_OPTIONS:
            raise RefusedError(f"options: {show(name)} is not known", param="options")
    return fields


class Generating:
    """`/api/chat` and `/api/generate`."""

    def __init__(self, service: Service, kind: Kind) -> None:
        self._service, self._kind = service, kind
        self._template = ChatTemplate.of(service.tokenizer)

    async def __call__(self, client: Client) -> None:
        """Raises what is to be told to the client, and ClientGoneError."""
        began = time.monotonic_ns()
        fields = await client.read_object(self._service.options.max_body_bytes)
        wanted = understood(self._kind, fields, self._template)
        if wanted.is_empty:
            done = {"done": True, "done_reason": "load"}
            await client.tell(200, {**self._part(""), **done})
            return
        body = await client.unless_gone(self._service.read_body(wanted.kind, wanted.fields))
        if wanted.stream:
            await client.start(200, _STREAM)
            await client.write(_line(self._part("")))
        try:
            answer, said = await self._answered(client, body, stream=wanted.stream)
        except ClientGoneError:
            raise
        except Exception as error:  # the client is told, in the stream
            if client.has_started:
                await client.write(_line(refusal(error).ollama_fields), more=False)
            raise
        end = _end(body, answer, time.monotonic_ns() - began)
        if wanted.stream:
            await client.write(_line({**self._part(""), **end}), more=False)
        else:
            await client.tell(200, {**self._part(said.text, said.calls, said.thoughts), **end})

    async def _answered(self, client: Client, body: Body, *, stream: bool) -> tuple[Answered, Said]:
        """The answer, which is told as it comes where it is a stream. Raises what has failed."""
        answer, watch, num_read = Answered(), Stopwatch(self._service.meter), 0
        said = Said(body.asked[0].form)
        async with self._service.ask(body.requests()[0]) as asking:
            while not asking.has_ended:
                events = await client.unless_gone(asking.events(KEEP_ALIVE_SECONDS))
                for _, event in events:
                    watch.count(event)
                    check(event)
                    answer.add(event)
                pieces = said.add(answer.text[num_read:], last=asking.has_ended)
                num_read = len(answer.text)
                text = "".join(piece for piece in pieces if isinstance(piece, str))
                calls = [piece for piece in pieces if isinstance(piece, Call)]
                thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
                if stream and (pieces or not events):  # one without text is nothing new
                    await client.write(_line(self._part(text, calls, thoughts)))
        return answer, said

    def _part(self, text: str, calls: Sequence[Call] = (), thoughts: str = "") -> dict[str, Any]:
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}}
            if self._kind == "chat"
            else {"response": text}
        )
        if thoughts:
            said.get("message", said)["thinking"] = thoughts
        if calls:
            said["message"]["tool_calls"] = [_told_call(one) for one in calls]
        name = {"model": self._service.name, "created_at": _now()}
        return {**name, **said, "done": False}


class Told:
    """What is told of the one model."""

    def __init__(self, service: Service) -> None:
        self._service = service
        config = service.model.config
        self._family = str(config.model_type)
        seed = f"{service.name} {service.model.weight_bytes} {config.to_json_string()}"
        self._digest = hashlib.sha256(seed.encode()).hexdigest()

    def version(self) -> dict[str, Any]:
        """`/api/version`."""
        return {"version": API_VERSION}

    def tags(self) -> dict[str, Any]:
        """`/api/tags`."""
        since = datetime.fromtimestamp(self._service.started, UTC).isoformat()
        return {"models": [{**self._model(), "modified_at": since}]}

    def running(self) -> dict[str, Any]:
        """`/api/ps`. It is never put out, so that its end is far."""
        stats, model = self._service.model.stats, self._model()
        times = {"expires_at": "2100-01-01T00:00:00Z", "size_vram": stats.device_peak_bytes}
        return {"models": [{**model, **times}]}

    def show(self) -> dict[str, Any]:
        """`/api/show`, whichever model is named."""
        service, positions = self._service, self._service.served.max_positions
        template = ChatTemplate.of(service.tokenizer)
        info: dict[str, Any] = {
            "general.architecture": self._family,
            "general.basename": service.name,
        }
        if positions is not None:
            info[f"{self._family}.context_length"] = positions
        return {
            "modelfile": f"FROM {service.name}",
            "parameters": "",
            "template": "" if template is None else template.source,
            "details": self._details(),
            "model_info": info,
            "capabilities": ["completion", *self._abilities()],
        }

    def _abilities(self) -> list[str]:
        template = ChatTemplate.of(self._service.tokenizer, for_tools=True)
        if template is None:
            return []
        tools = ["tools"] if template.knows("tools") else []
        return [*tools, *(["thinking"] if AnswerForm.of(template.source).has_thoughts else [])]

    def _model(self) -> dict[str, Any]:
        name = self._service.name
        size = self._service.model.weight_bytes
        named = {"name": name, "model": name, "size": size, "digest": self._digest}
        return {**named, "details": self._details()}

    def _details(self) -> dict[str, Any]:
        dtype = str(self._service.model.dtype).removeprefix("torch.")
        return {
            "parent_model": "",
            "format": "safetensors",
            "family": self._family,
            "families": [self._family],
            "parameter_size": "",
            "quantization_level": {"bfloat16": "BF16", "float16": "F16"}.get(dtype, "F32"),
        }


def _end(body: Body, answer: Answered, nanoseconds: int) -> dict[str, Any]:
    counts = answer.counts
    return {
        "done": True,
        "done_reason": answer.finish_reason,
        "total_duration": nanoseconds,
        "load_duration": 0,
        "prompt_eval_count": len(body.asked[0].token_ids),
        "prompt_eval_duration": round(counts.prefill_seconds * 1e9),
        "eval_count": counts.num_new_tokens,
        "eval_duration": round(counts.decode_seconds * 1e9),
    }


def _told_call(call: Call) -> dict[str, Any]:
    """Arguments are an object here."""
    return {"function": {"name": call.name, "arguments": parse_object(call.arguments.encode())}}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _line(fields: Mapping[str, Any]) -> bytes:
    return as_json(fields) + b"\n"
