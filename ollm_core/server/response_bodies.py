"""Bodies of `/v1/responses`, in OpenAI's newer form: put into the words of chat, and understood
there.

Source: the responses page of OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollm_core.files.untrusted_json import show
from ollm_core.serving.openai.fields import FUNCTION, SERVED, SHORT, TOOL, TOOL_WORDS
from ollm_core.serving.openai.limits import MAX_TOOLS
from ollm_core.serving.openai.messages import ROLES
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.schemas import (
    ANYTHING,
    NOTHING,
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
    whole,
)

_AS_THEY_ARE = ("temperature", "top_p", "stream", "service_tier", "seed", "stop")
_TEXTS = ("input_text", "output_text")
_PART = object_of({"type": one_of(*_TEXTS), "text": TEXT}, ["type", "text"], more=True)
_CONTENT = any_of(TEXT, list_of(_PART))
_STATE = {"id": ANYTHING, "status": ANYTHING}
_THOUGHT = object_of(
    {"type": one_of("reasoning_text", "summary_text"), "text": TEXT}, ["type", "text"], more=True
)
_TURNS = any_of(
    object_of(
        {
            "type": one_of("message"), "role": one_of(*ROLES), "content": _CONTENT,
            "phase": ANYTHING, **_STATE,
        },
        ["role", "content"], NOTHING,
    ),
    object_of(
        {
            "type": one_of("function_call"), "call_id": nullable(SHORT), "name": SHORT,
            "arguments": any_of(TEXT, OBJECT), **_STATE,
        },
        ["type", "name", "arguments"], NOTHING,
    ),
    object_of(
        {
            "type": one_of("function_call_output"), "call_id": nullable(SHORT),
            "output": _CONTENT, **_STATE,
        },
        ["type", "output"], NOTHING,
    ),
    object_of(
        {
            "type": one_of("reasoning"), "content": nullable(list_of(_THOUGHT)),
            "summary": ANYTHING, "encrypted_content": ANYTHING, **_STATE,
        },
        ["type"], NOTHING,
    ),
)  # fmt: skip
_REASONING = object_of(
    {
        "effort": nullable(SERVED["chat"]["reasoning_effort"].schema),
        "summary": ANYTHING,
        "generate_summary": ANYTHING,
    }
)
_FORMAT = any_of(
    object_of({"type": one_of("text", "json_object")}, ["type"], more=True),
    object_of({"type": one_of("json_schema"), "schema": OBJECT}, ["type", "schema"], more=True),
)
_FUNCTION = object_of({"type": one_of("function"), **FUNCTION}, ["type", "name"])
_NAMED = object_of({"type": one_of("function"), "name": TEXT}, ["type", "name"], more=True)
FIELDS: Fields = {
    "input": Field(any_of(TEXT, list_of(_TURNS, 1)), required=True),
    "instructions": Field(TEXT),
    "max_output_tokens": Field(whole(1)),
    "text": Field(object_of({"format": _FORMAT})),
    "tools": Field(list_of(any_of(_FUNCTION, TOOL), 0, MAX_TOOLS)),
    "tool_choice": Field(any_of(TOOL_WORDS, _NAMED)),
    "store": Field(SWITCH),
    "background": Field(SWITCH),
    **{name: SERVED["chat"][name] for name in _AS_THEY_ARE},
    "previous_response_id": only(),
    "conversation": only(),
    "prompt": only(),
    "truncation": only("disabled"),
    "top_logprobs": only(0),
    "max_tool_calls": only(),
    "reasoning": Field(_REASONING),
    **ignored(
        "model", "user", "metadata", "safety_identifier", "prompt_cache_key", "include",
        "prompt_cache_retention", "parallel_tool_calls", "stream_options",
    ),
}  # fmt: skip


def understood(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A body in the words of chat. Raises RefusedError, which names the field."""
    said = {name: value for name, value in fields.items() if value is not None}
    check_names(FIELDS, said)
    chat = {name: said[name] for name in _AS_THEY_ARE if name in said}
    if "max_output_tokens" in said:
        chat["max_completion_tokens"] = said["max_output_tokens"]
    reasoning = said.get("reasoning")
    if isinstance(reasoning, dict) and reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    if (wanted := _format(said.get("text", {}))) is not None:
        chat["response_format"] = wanted
    turns, first = said.get("input"), said.get("instructions")
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list) or not turns:
        raise RefusedError(
            f"input: need a text or a list of at least one turn, have {show(turns)}", param="input"
        )
    messages: list[dict[str, Any]] = []
    if first is not None:
        messages.append({"role": "system", "content": first})
    for place, turn in enumerate(turns):
        _add(messages, place, turn)
    check_body(FIELDS, fields)
    said_something = [one for one in messages if not _only_thinks(one)]
    return {**chat, **_tools(said), "messages": said_something}


def _tools(said: Mapping[str, Any]) -> dict[str, Any]:
    """The functions, in the words of chat."""
    chat: dict[str, Any] = {}
    if "tools" in said:
        tools = said["tools"]
        chat["tools"] = [_nested(one) for one in tools] if isinstance(tools, list) else tools
    if "tool_choice" in said:
        chat["tool_choice"] = _nested(said["tool_choice"])
    return chat


def _nested(tool: Any) -> Any:
    """A function has its fields in an object of its own."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    own = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": own}


def _add(messages: list[dict[str, Any]], place: int, turn: Any) -> None:
    """One more turn: a message, a call of the assistant's, or what one gave."""
    kind = turn.get("type", "message") if isinstance(turn, dict) else None
    if kind == "function_call":
        _check_fields(place, turn, {"type", "id", "call_id", "name", "arguments", "status"})
        function = {"name": turn.get("name"), "arguments": turn.get("arguments")}
        call = {"id": turn.get("call_id"), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        _check_fields(place, turn, {"type", "id", "call_id", "output", "status"})
        content, call_id = _content(place, turn.get("output")), turn.get("call_id")
        messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    elif kind == "reasoning":
        _check_fields(
            place, turn, {"type", "id", "content", "summary", "encrypted_content", "status"}
        )
        thought = {"reasoning_content": _thoughts(place, turn.get("content"))}
        messages.append({"role": "assistant", "content": None, **thought})
    else:
        message = _message(place, turn)
        if messages and message["role"] == "assistant" and _only_thinks(messages[-1]):
            message = {**messages.pop(), **message}
        messages.append(message)


def _only_thinks(message: Mapping[str, Any]) -> bool:
    """What belongs to the turn after it, if that is the assistant's."""
    return message.keys() == {"role", "content", "reasoning_content"} and not message["content"]


def _thoughts(place: int, content: Any) -> str:
    """The text of a turn of thoughts."""
    parts = [] if content is None else content
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    ):
        param = f"input[{place}]"
        raise RefusedError(
            f"{param}: content: need a list of parts with text, have {show(content)}", param=param
        )
    return "".join(part["text"] for part in parts)


def _format(text: Any) -> dict[str, Any] | None:
    """What an answer is to follow, in the words of chat; None where that is nothing."""
    wanted = text.get("format", {"type": "text"}) if isinstance(text, dict) else None
    if not isinstance(wanted, dict) or text.keys() - {"format"}:
        raise RefusedError(
            f"text: need an object with a format, have {show(text)}",
            code="unsupported_parameter",
            param="text",
        )
    if wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    return dict(wanted)


def _message(place: int, turn: Any) -> dict[str, Any]:
    param = f"input[{place}]"
    if not isinstance(turn, dict) or turn.get("type", "message") != "message":
        raise RefusedError(
            f"{param}: need a message, have {show(turn)}",
            code="unsupported_parameter",
            param=param,
        )
    _check_fields(place, turn, {"type", "role", "content", "id", "status", "phase"})
    return {"role": turn.get("role"), "content": _content(place, turn.get("content"))}


def _check_fields(place: int, turn: Mapping[str, Any], known: set[str]) -> None:
    left = {name for name, value in turn.items() if value is not None}
    if unknown := left - known:
        param = f"input[{place}]"
        raise RefusedError(f"{param}: {show(min(unknown))} is not known", param=param)


def _content(place: int, content: Any) -> Any:
    if isinstance(content, list):
        return [_part(f"input[{place}]", part) for part in content]
    return content


def _part(param: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") not in _TEXTS:
        raise RefusedError(
            f"{param}: content: need parts of type {' or '.join(_TEXTS)}, have {show(part)}",
            code="unsupported_parameter",
            param=param,
        )
    return {"type": "text", "text": part.get("text")}
