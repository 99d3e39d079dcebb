"""The functions that a chat offers the model, and which of them it must call, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollm_core.files.untrusted_json import depth, show
from ollm_core.serving.openai.limits import MAX_TOOLS, TOOL_NAME
from ollm_core.serving.openai.messages import MAX_DEPTH
from ollm_core.serving.openai.refused import RefusedError, check_text, unsupported
from ollm_core.text.tool_forms import ToolForm, form_of

_NAME = re.compile(TOOL_NAME)
_FIELDS = {"name", "description", "parameters", "strict"}
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
_WORDS = ("none", "auto", "required")
_PLAIN = ToolForm(marks=())
"""A call as a JSON object, where the model's own form is not known."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Functions that may be called in an answer."""

    form: ToolForm
    tools: Sequence[Mapping[str, Any]]
    """Each with a name, a schema of its parameters, and what else was said of it."""
    forced: Sequence[Mapping[str, Any]] = ()
    """Those of which one must be called, and nothing else said."""

    @property
    def opening(self) -> str:
        """What is written for the model before a call that must come."""
        return self.form.opening if self.forced else ""

    def schema(self) -> dict[str, Any]:
        """Of a call that must come."""
        calls, known = [], {}
        for number, tool in enumerate(self.forced):
            name = f"parameters{number}"
            known[name] = _moved(tool["function"]["parameters"], f"#/$defs/{name}")
            calls.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool["function"]["name"]},
                        self.form.arguments: {"$ref": f"#/$defs/{name}"},
                    },
                    "required": ["name", self.form.arguments],
                    "additionalProperties": False,
                }
            )
        one: dict[str, Any] = {"anyOf": calls}
        if self.form.in_list:
            one = {"type": "array", "items": one, "minItems": 1, "maxItems": 1}
        return {**one, "$defs": known}


def read_tools(said: Mapping[str, Any], template: str) -> ToolUse | None:
    """The functions of a body, for a model with this chat template; None where there are none, or
    none may be called. Raises RefusedError.
    """
    tools = said.get("tools", [])
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise RefusedError(
            f"tools: need a list of at most {MAX_TOOLS}, have {show(tools)}", param="tools"
        )
    made = [_tool(place, one) for place, one in enumerate(tools)]
    names = [tool["function"]["name"] for tool in made]
    if len({*names}) < len(names):
        raise RefusedError("tools: need names that differ", param="tools")
    choice = said.get("tool_choice", "auto" if made else "none")
    forced = _forced(choice, made)
    if not made or choice == "none":
        return None
    if not re.search(r"\btools\b", template):
        raise unsupported(
            "tools: the model's chat template does not take them; leave them out, or ask for JSON "
            "by response_format",
            "tools",
        )
    form = form_of(template)
    if form is None and not forced:
        raise unsupported(
            "tools: how this model writes calls is not known; say which to call by tool_choice, "
            "'required' or a function",
            "tools",
        )
    return ToolUse(form or _PLAIN, made, forced)


def _tool(place: int, tool: Any) -> dict[str, Any]:
    where = f"tools[{place}]"
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise unsupported(f"{where}: need a function, have {show(tool)}", "tools")
    if unknown := (tool.keys() - {"type", "function"}) | (function.keys() - _FIELDS):
        raise RefusedError(f"{where}: {show(min(unknown))} is not known", param="tools")
    name, about = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RefusedError(
            f"{where}: name: need up to 64 letters, digits, and any of _.-, have {show(name)}",
            param="tools",
        )
    made: dict[str, Any] = {"name": name, "description": ""}  # templates add to it
    if about is not None:
        if not isinstance(about, str):
            raise RefusedError(f"{where}: description: need text", param="tools")
        check_text("tools", about)
        made["description"] = about
    schema = function.get("parameters")
    schema = _NOTHING if schema is None else schema
    if not isinstance(schema, dict) or depth(schema, MAX_DEPTH) > MAX_DEPTH:
        raise RefusedError(f"{where}: parameters: need a JSON schema", param="tools")
    if function.get("strict") not in (None, True, False):
        raise RefusedError(f"{where}: strict: need true or false", param="tools")
    return {"type": "function", "function": {**made, "parameters": schema}}


def _forced(choice: Any, tools: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Those of which one must be called."""
    if choice in ("none", "auto"):
        return ()
    if choice == "required" and tools:
        return tools
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(choice, dict) and choice.get("type") == "function":
        found = [tool for tool in tools if tool["function"]["name"] == name]
        if found:
            return found
    raise RefusedError(
        f"tool_choice: need one of {', '.join(_WORDS)}, or a function of tools, "
        f"have {show(choice)}",
        param="tool_choice",
    )


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references lead where they did when it stands at `place` of another."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(one, place) for name, one in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
