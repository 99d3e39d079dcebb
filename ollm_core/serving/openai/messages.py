"""The messages of a chat, in OpenAI's form: texts, calls of functions, and what these gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ollm_core.files.untrusted_json import parse_object, show
from ollm_core.serving.openai.limits import MAX_SHORT_CHARS
from ollm_core.serving.openai.refused import RefusedError, check_text, unsupported

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""What clients, and chat templates, call the thoughts of an assistant's message."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_DEPTH = 64
"""Of the arguments of a call."""
_PART = {"type", "text"}
_FIELDS: Mapping[str, frozenset[str]] = {
    "assistant": frozenset({"role", "content", "tool_calls", *THOUGHTS}),
    "tool": frozenset({"role", "content", "tool_call_id", "name"}),
}
_CALL = {"id", "type", "function", "index"}


def read_message(number: int, message: Any) -> dict[str, Any]:
    """One message, as chat templates have them: its content is one text, arguments of calls are
    objects. Raises RefusedError.
    """
    param = f"messages[{number}]"
    if not isinstance(message, dict):
        raise RefusedError(f"{param}: need a JSON object, have {show(message)}", param=param)
    role = message.get("role")
    if role not in ROLES:
        raise RefusedError(
            f"{param}: role: need one of {', '.join(ROLES)}, have {show(role)}", param=param
        )
    known = _FIELDS.get(role, {"role", "content"})
    for name, value in message.items():
        if name not in known and value not in (None, [], {}):
            raise unsupported(f"{param}: {show(name)} is not supported", param)
    made: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls") if role == "assistant" else None
    made["content"] = _content(param, message.get("content"), may_lack=bool(calls))
    if calls is not None and calls != []:
        made["tool_calls"] = _calls(param, calls)
    if role == "assistant" and (thoughts := _thoughts(param, message)):
        made |= dict.fromkeys(THOUGHTS, thoughts)
    if role == "tool":
        for name in ("tool_call_id", "name"):
            if message.get(name) is not None:
                made[name] = _short(param, name, message[name])
    return made


def name_results(messages: Sequence[dict[str, Any]]) -> None:
    """Give each message of what a function gave the function's name, which some chat templates
    want: clients say which call it was.
    """
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            if "id" in call:
                names[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and message.get("tool_call_id") in names:
            message.setdefault("name", names[message["tool_call_id"]])


def _content(param: str, content: Any, *, may_lack: bool) -> str:
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        content = "".join(_part(param, part) for part in content)
    if not isinstance(content, str):
        raise RefusedError(f"{param}: content: need text, have {show(content)}", param=param)
    check_text(param, content)
    return content


def _thoughts(param: str, message: Mapping[str, Any]) -> str:
    for name in THOUGHTS:
        text = message.get(name)
        if text is not None and not isinstance(text, str):
            raise RefusedError(f"{param}: {name}: need text, have {show(text)}", param=param)
        if text:
            check_text(param, text)
            return str(text)
    return ""


def _part(param: str, part: Any) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text" and part.keys() == _PART
    if not is_text or not isinstance(part["text"], str):
        raise unsupported(f"{param}: content: need parts of type 'text', have {show(part)}", param)
    return str(part["text"])


def _calls(param: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RefusedError(f"{param}: tool_calls: need a list, have {show(calls)}", param=param)
    return [_call(f"{param}: tool_calls[{place}]", param, one) for place, one in enumerate(calls)]


def _call(where: str, param: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.keys() - _CALL or call.get("type") not in _TYPES:
        raise RefusedError(f"{where}: need a call of a function, have {show(call)}", param=param)
    if unknown := function.keys() - {"name", "arguments", "index"}:
        raise RefusedError(f"{where}: {show(min(unknown))} is not known", param=param)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_object(arguments.encode(), strict=True, max_depth=MAX_DEPTH)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise RefusedError(f"{where}: arguments: need a JSON object", param=param)
    made = {"function": {"name": _short(param, "name", function.get("name")),
                         "arguments": arguments}, "type": "function"}  # fmt: skip
    if call.get("id") is not None:
        made = {"id": _short(param, "id", call["id"]), **made}
    return made


_TYPES = (None, "function")


def _short(param: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_SHORT_CHARS:
        raise RefusedError(
            f"{param}: {name}: need 1 to {MAX_SHORT_CHARS} characters, have {show(value)}",
            param=param,
        )
    check_text(param, value)
    return value
