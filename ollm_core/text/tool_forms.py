"""How families of models write calls of functions in their answers, known by their chat templates.

A checkpoint's own `response_template`, which transformers would read answers by, is not used: its
patterns are somebody else's, and nothing bounds the time that one takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CALL: Mapping[str, Any] = {"type": "function", "function": "{content}"}
_NAMED: Mapping[str, Any] = {
    "type": "function",
    "function": {"name": "{name}", "arguments": "{content}"},
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ToolForm:
    """One way of writing a call."""

    marks: tuple[str, ...]
    """Texts that all chat templates of such models have."""
    open: str = ""
    """What begins a call. "": an answer that calls is a JSON object from its first character on."""
    close: str | None = None
    """What ends it; None: the end of the answer."""
    field: Mapping[str, Any] | None = None
    """A call between these, as a field of transformers' response templates."""
    arguments: str = "arguments"
    """What a JSON object of a call has its arguments under."""
    opening: str = ""
    """What the model writes before such an object: where one must come, it is written for it."""
    in_list: bool = False
    """Whether the object stands in a list."""
    control: tuple[str, ...] = ()
    """What of the form may be control tokens, which texts of answers else leave out."""
    has_channels: bool = False
    """Whether answers are messages on channels, which `harmony` reads."""


FORMS = (
    ToolForm(  # Gemma 4
        marks=("<|tool_call>call:",),
        open="<|tool_call>",
        close="<tool_call|>",
        field={
            "open_pattern": r"<\|tool_call>call:(?P<name>[\w.-]+)",
            "close": "<tool_call|>",
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
            "transform": _NAMED,
        },
        control=("<|tool_call>", "<tool_call|>", '<|"|>'),
    ),
    ToolForm(  # Qwen3-Coder, Qwen 3.5
        marks=("<tool_call>", "<function="),
        open="<tool_call>",
        close="</tool_call>",
        field={
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
            },
            "transform": _NAMED,
        },
        control=("<tool_call>", "</tool_call>"),
    ),
    ToolForm(  # GLM 4
        marks=("<tool_call>", "<arg_key>"),
        open="<tool_call>",
        close="</tool_call>",
        field={
            "open_pattern": r"<tool_call>\s*(?P<name>[\w.-]+)",
            "close": "</tool_call>",
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<arg_key>(?P<key>[^<]*)</arg_key>\s*"
                r"<arg_value>(?P<value>.*?)</arg_value>"
            },
            "transform": _NAMED,
        },
        control=(
            "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
        ),
    ),
    ToolForm(  # Hermes, Qwen 2.5 and 3, SmolLM2 and 3, and many others
        marks=("<tool_call>",),
        open="<tool_call>",
        close="</tool_call>",
        field={
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "transform": _CALL,
        },
        opening="<tool_call>\n",
        control=("<tool_call>", "</tool_call>"),
    ),
    ToolForm(  # Mistral, from its tokenizer's version 11 on
        marks=("[TOOL_CALLS]", "[ARGS]"),
        open="[TOOL_CALLS]",
        field={
            "open_pattern": r"\[TOOL_CALLS\](?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
            "close_pattern": r"(?=\[TOOL_CALLS\])",
            "content": "json",
            "transform": _NAMED,
        },
        control=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ),
    ToolForm(  # Mistral, earlier
        marks=("[TOOL_CALLS]",),
        open="[TOOL_CALLS]",
        field={
            "open": "[TOOL_CALLS]",
            "content": "json",
            "transform": {
                "type": "function", "function": {"name": "{name}", "arguments": "{arguments}"},
            },
            "transform_each": True,
        },
        opening="[TOOL_CALLS]",
        in_list=True,
        control=("[TOOL_CALLS]",),
    ),
    ToolForm(  # gpt-oss
        marks=("<|channel|>", "<|message|>"),
        open="<|channel|>",
        control=(
            "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>",
            "<|call|>",
        ),
        has_channels=True,
    ),
    ToolForm(  # Llama 3
        marks=('{"name": ', '"parameters": '),
        arguments="parameters",
    ),
)  # fmt: skip


def form_of(template: str) -> ToolForm | None:
    """That of models with this chat template; None if it is not known."""
    return next((form for form in FORMS if all(mark in template for mark in form.marks)), None)
