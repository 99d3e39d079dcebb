"""Functions of a body, and those of a row."""

from __future__ import annotations

import pytest
from calling_model import CALLS
from transformers import AutoTokenizer

from ollm_core.serving.offline import Answered
from ollm_core.serving.openai.answers import Writer
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.requests import Reader, Row
from ollm_core.serving.openai.tools import ToolUse, read_tools
from ollm_core.text.tool_forms import form_of

LOOK = {"type": "function", "function": {"name": "look"}}
BODY = {"messages": [{"role": "user", "content": "x"}], "tools": [LOOK]}


@pytest.fixture
def tokenizer(tiny_chat):
    """Whose chat template takes functions."""
    made = AutoTokenizer.from_pretrained(tiny_chat)
    made.chat_template = CALLS
    return made


def row(**more):
    """A line of a batch."""
    return Row("a", {"url": "/v1/chat/completions", "body": {**BODY, **more}})


def test_a_row_may_call_and_need_not(tokenizer):
    """Its answer is that of a server; what must be called needs a grammar, which rows have none
    of.
    """
    asked = Reader(tokenizer).read(row())
    assert asked.tools is not None
    text = 'Yes.\n<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    body = Writer(tokenizer, "m").body(asked, [Answered(text=text, finish_reason="stop")])
    [choice] = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Yes.", "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}
    with pytest.raises(RefusedError, match="tool_choice: need 'auto' or 'none' in a row"):
        Reader(tokenizer).read(row(tool_choice="required"))


def test_a_checkpoint_may_have_a_template_of_its_own_for_functions(tokenizer):
    """By the name that transformers has for it."""
    plain = "{{ messages[0].content }}"
    tokenizer.chat_template = {"default": plain, "tool_use": CALLS}
    asked = Reader(tokenizer).read(row())
    assert tokenizer.decode(asked.token_ids).endswith("[user]x[assistant]")
    assert Reader(tokenizer).read(row(tools=[])).token_ids == tokenizer("x").input_ids


def test_references_of_a_schema_lead_where_they_did():
    """Though it stands in another one; those to elsewhere stay."""
    parameters = {
        "properties": {"a": {"$ref": "#/$defs/a"}, "$ref": {"type": "string"}},
        "$defs": {"a": {"anyOf": [{"$ref": "#"}, {"$ref": "https://example.org/x"}]}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    form = form_of("<tool_call>")
    schema = ToolUse(form, [tool], [tool]).schema()
    moved = schema["$defs"]["parameters0"]
    assert moved["properties"] == {
        "a": {"$ref": "#/$defs/parameters0/$defs/a"}, "$ref": {"type": "string"},
    }  # fmt: skip
    assert moved["$defs"]["a"]["anyOf"] == [
        {"$ref": "#/$defs/parameters0"}, {"$ref": "https://example.org/x"},
    ]  # fmt: skip
    in_list = ToolUse(form_of("[TOOL_CALLS]"), [tool], [tool]).schema()
    assert (in_list["type"], in_list["maxItems"]) == ("array", 1)


def test_names_and_depth_have_limits():
    """A schema that is deep, or too many functions, are refused before anything is made of them."""
    deep = {}
    for _ in range(70):
        deep = {"not": deep}
    for tools in (
        [{"type": "function", "function": {"name": "f", "parameters": deep}}],
        [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)],
        [{"type": "function", "function": {"name": "f" * 65}}],
        [{"type": "function", "function": {"name": "f", "description": "\ud800"}}],
        [{"type": "function", "function": {"name": "f"}, "more": 1}],
    ):
        with pytest.raises(RefusedError) as refused:
            read_tools({"tools": tools}, CALLS)
        assert refused.value.param == "tools"
