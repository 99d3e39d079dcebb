"""Declared fields: what they take, what they do not, and that their schema says the same."""

from __future__ import annotations

import pytest

from ollm_core.serving.openai.fields import ROWS, SERVED
from ollm_core.serving.openai.refused import RefusedError
from ollm_core.serving.openai.schemas import (
    SWITCH,
    TEXT,
    Field,
    any_of,
    body_schema,
    check_body,
    check_names,
    ignored,
    list_of,
    object_of,
    one_of,
    only,
    text,
    whole,
)

FIELDS = {
    "a": Field(whole(1, 9), required=True),
    "b": Field(any_of(TEXT, list_of(text(1, 3), 1, 2))),
    "c": Field(object_of({"d": SWITCH}, ["d"])),
    "e": only(0, "x"),
    "f": only(),
    "g": Field(text(1, pattern="[a-z]+")),
    "h": Field({"type": "number", "exclusiveMinimum": 0}),
    "i": Field({"type": "object", "minProperties": 1, "maxProperties": 1}),
    **ignored("z"),
}
GOOD = [
    {"a": 1}, {"a": 9.0}, {"a": 1, "b": "x"}, {"a": 1, "b": ["x", "yyy"]}, {"a": 1, "b": None},
    {"a": 1, "c": {"d": True}}, {"a": 1, "e": 0.0}, {"a": 1, "e": "x", "f": None},
    {"a": 1, "z": [{}]}, {"a": 1, "unknown": None}, {"a": 1, "g": "abc"}, {"a": 1, "h": 0.1},
    {"a": 1, "i": {"x": 1}},
]  # fmt: skip
BAD = [
    {}, {"a": None}, {"a": 0}, {"a": 10}, {"a": True}, {"a": 1.5}, {"a": "1"}, {"a": 1, "b": 3},
    {"a": 1, "b": []}, {"a": 1, "b": ["", "x"]}, {"a": 1, "b": ["yyyy"]},
    {"a": 1, "b": ["x", "x", "x"]}, {"a": 1, "c": {}}, {"a": 1, "c": {"d": True, "e": 1}},
    {"a": 1, "c": {"d": None}}, {"a": 1, "e": False}, {"a": 1, "e": 1}, {"a": 1, "f": 0},
    {"a": 1, "unknown": 0}, {"a": 1, "g": "abc\n"}, {"a": 1, "g": "xA"}, {"a": 1, "h": 0},
    {"a": 1, "i": {}}, {"a": 1, "i": {"x": 1, "y": 2}},
]  # fmt: skip


@pytest.mark.parametrize("body", GOOD)
def test_what_is_declared_is_taken(body):
    """null is as nothing, also of a field that nobody knows."""
    check_body(FIELDS, body)


@pytest.mark.parametrize("body", BAD)
def test_what_is_not_is_refused(body):
    """In one line."""
    with pytest.raises(RefusedError) as refused:
        check_body(FIELDS, body)
    assert "\n" not in refused.value.message


def test_a_library_finds_the_same():
    """Of the schema that clients are told."""
    validators = pytest.importorskip("jsonschema_rs")
    validator = validators.Draft202012Validator(dict(body_schema(FIELDS)))
    assert all(validator.is_valid(body) for body in GOOD)
    assert not [body for body in BAD if validator.is_valid(body)]
    for fields in (*ROWS.values(), *SERVED.values()):
        validators.meta.validate(dict(body_schema(fields)))


def test_names_say_what_is_wrong():
    """A place in the body, and the field."""
    with pytest.raises(RefusedError, match=r"^c\.d: need boolean, have 3$") as refused:
        check_body({"c": Field(object_of({"d": SWITCH}))}, {"c": {"d": 3}})
    assert refused.value.param == "c"
    with pytest.raises(RefusedError, match=r"^l\[1\]: need string"):
        check_body({"l": Field(list_of(TEXT), required=True)}, {"l": ["", 1]})
    with pytest.raises(RefusedError) as refused:
        check_names(FIELDS, {"x" * 300: 1})
    assert (refused.value.code, len(refused.value.param)) == ("unknown_parameter", 100)
    with pytest.raises(RefusedError, match=r"^e: need 0 or 'x' or nothing, have 2") as refused:
        check_names(FIELDS, {"e": 2})
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(RefusedError, match=r"^f: is not supported, have 2"):
        check_names(FIELDS, {"f": 2})


def test_equal_values_are_those_of_json():
    """true is not 1."""
    for value, other in ((True, 1), (1, True), (0, False)):
        with pytest.raises(RefusedError):
            check_body({"x": Field(one_of(other))}, {"x": value})
