"""Calls of functions in answers, as families of models write them."""

from __future__ import annotations

import json

import pytest

from ollm_core.text.tool_calls import BareCalls, Call, MarkedCalls
from ollm_core.text.tool_forms import FORMS, form_of


def tool(name, **properties):
    """A function with parameters of these types."""
    known = {one: {"type": kind} for one, kind in properties.items()}
    parameters = {"type": "object", "properties": known}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("look", where="string", days="integer"), tool("go-to.place", deep="object")]
TEMPLATES = {
    "hermes": "{% if tools %}<tool_call>{% endif %}",
    "xml": "<tool_call>\n<function=x>",
    "glm": "<tool_call>{{ name }}<arg_key>",
    "mistral": "[TOOL_CALLS]",
    "mistral args": "[TOOL_CALLS]{{ name }}[ARGS]",
    "gemma": "<|tool_call>call:{{ name }}",
    "llama": '{"name": {{ x }}, "parameters": {}}',
    "harmony": "<|channel|>commentary to=functions.x<|message|>",
}
ONE = ("look", {"where": "Rome, Itálìa", "days": 2})
TWO = ("go-to.place", {"deep": {"a": [1, None]}})
JSON_ONE = '{"name": "look", "arguments": {"where": "Rome, Itálìa", "days": 2}}'
JSON_TWO = '{"name": "go-to.place", "arguments": {"deep": {"a": [1, null]}}}'
ANSWERS = [
    ("hermes", f"<tool_call>\n{JSON_ONE}\n</tool_call>", [ONE]),
    ("hermes", f"Let me see.\n\n<tool_call>{JSON_ONE}</tool_call>", ["Let me see.", ONE]),
    (
        "hermes",
        f"<tool_call>\n{JSON_ONE}\n</tool_call>\n<tool_call>\n{JSON_TWO}\n</tool_call>\n",
        [ONE, TWO],
    ),
    ("hermes", f"<tool_call>{JSON_ONE}", [ONE]),  # its end is where the answer ends
    ("hermes", f"<tool_call>{JSON_TWO}</tool_call> Done.", [TWO, "Done."]),
    ("hermes", "a < b, <tool> and <tool_call", ["a < b, <tool> and <tool_call"]),
    ("hermes", " plain \n", [" plain \n"]),
    ("hermes", "", []),
    # what is no call of one of the functions stays text
    ("hermes", "<tool_call>{'name'}</tool_call>", ["<tool_call>{'name'}</tool_call>"]),
    ("hermes", '<tool_call>{"name": "look", "argu', ['<tool_call>{"name": "look", "argu']),
    (
        "hermes",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        ['<tool_call>{"name": "other", "arguments": {}}</tool_call>'],
    ),
    (
        "hermes",
        '<tool_call>{"name": "look", "arguments": {"days": NaN}}</tool_call>',
        ['<tool_call>{"name": "look", "arguments": {"days": NaN}}</tool_call>'],
    ),
    ("hermes", "<tool_call>" + "[" * 9000, ["<tool_call>" + "[" * 9000]),
    (
        "xml",
        "I look.\n<tool_call>\n<function=look>\n<parameter=where>\nRome, Itálìa\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        ["I look.", ONE],
    ),
    (
        "glm",
        "<tool_call>look\n<arg_key>where</arg_key>\n<arg_value>Rome, Itálìa</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        [ONE],
    ),
    ("mistral", f"[TOOL_CALLS][{JSON_ONE}, {JSON_TWO}]", [ONE, TWO]),
    ("mistral", f"Yes. [TOOL_CALLS] [{JSON_ONE}]", ["Yes.", ONE]),
    (
        "mistral args",
        '[TOOL_CALLS]look[ARGS]{"where": "Rome, Itálìa", "days": 2}'
        '[TOOL_CALLS]go-to.place[ARGS]{"deep": {"a": [1, null]}}',
        [ONE, TWO],
    ),
    (
        "gemma",
        '<|tool_call>call:look{where:<|"|>Rome, Itálìa<|"|>,days:2}<tool_call|>',
        [ONE],
    ),
    ("llama", JSON_ONE.replace("arguments", "parameters"), [ONE]),
    ("llama", "<|python_tag|>" + JSON_TWO.replace("arguments", "parameters"), [TWO]),
    (
        "llama",
        f"{JSON_ONE}; {JSON_TWO}".replace("arguments", "parameters"),
        [ONE, TWO],
    ),
    ("llama", '{"a": 1} is JSON', ['{"a": 1} is JSON']),
    ("llama", "The sky is {blue}.\n", ["The sky is {blue}.\n"]),
]  # fmt: skip


def call_parser(form, tools, *, forced=False):
    """For one answer."""
    return (MarkedCalls if form.open and not forced else BareCalls)(form, tools)


def said(pieces):
    """Texts, joined where they are beside each other, and calls."""
    made = []
    for piece in pieces:
        if isinstance(piece, Call):
            made.append((piece.name, json.loads(piece.arguments)))
        elif made and isinstance(made[-1], str):
            made[-1] += piece
        else:
            made.append(piece)
    return made


@pytest.mark.parametrize(("form", "answer", "expected"), ANSWERS)
def test_calls_are_found_whole_and_letter_by_letter(form, answer, expected):
    """Beside the text of an answer, of which nothing is lost."""
    form = form_of(TEMPLATES[form])
    for size in (len(answer) + 1, 7, 1):
        parser = call_parser(form, TOOLS)
        pieces = []
        for begin in range(0, len(answer), size):
            pieces += parser.add(answer[begin : begin + size])
        assert said([*pieces, *parser.finish()]) == expected, size


def test_text_comes_before_the_answer_ends():
    """What cannot begin a call is told at once."""
    parser = call_parser(form_of(TEMPLATES["hermes"]), TOOLS)
    assert parser.add("Hello you") == ["Hello you"]
    assert parser.add(" and <tool") == [" and"]
    assert parser.add("s") == [" <tools"]


def test_a_call_that_must_come_is_an_object():
    """As a grammar has it written, in the words of its form."""
    for name, text in [
        ("hermes", JSON_ONE), ("mistral", f"[{JSON_ONE}]"), ("xml", JSON_ONE),
        ("llama", JSON_ONE.replace("arguments", "parameters")),
    ]:  # fmt: skip
        parser = call_parser(form_of(TEMPLATES[name]), TOOLS, forced=True)
        assert said([*parser.add(text[:9]), *parser.add(text[9:]), *parser.finish()]) == [ONE]


def test_each_form_has_a_template_that_shows_it():
    """And each template one form; of others nothing is known."""
    assert {form_of(template) for template in TEMPLATES.values()} == {*FORMS}
    assert form_of("{% for m in messages %}{{ m.content }}{% endfor %}") is None


def test_ids_are_as_mistral_has_them():
    """Nine letters and digits, never the same."""
    ids = {Call("x", "{}").call_id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)
