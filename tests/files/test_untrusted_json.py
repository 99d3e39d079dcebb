"""JSON of anybody: an object, or a reason of one line."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ollm_conformance
import ollm_core
from ollm_core.files.untrusted_json import parse_object, show

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[1]", "must be a JSON object"),
        (b'{"a": 1', "delimiter"),
        (b"\xff{}", "utf-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_what_is_no_object_is_refused(raw: bytes, reason: str):
    """A ValueError of one line, never another exception."""
    for strict in (False, True):
        with pytest.raises(ValueError, match=reason) as refused:
            parse_object(raw, strict=strict)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("raw", [b'{"a": NaN}', b'{"a": 1, "a": 2}', b'{"\\ud800": 1}'])
def test_only_strict_refuses_what_python_takes(raw: bytes):
    """NaN, a name twice and lone surrogates."""
    assert parse_object(raw)
    with pytest.raises(ValueError):  # noqa: PT011 (each has its own reason)
        parse_object(raw, strict=True)


@pytest.mark.parametrize("inner", [b"[" * 3 + b"]" * 3, b'{"b": [{}]}', b'[1, {"b": {"c": 2}}]'])
def test_depth_is_counted(inner: bytes):
    """Objects and lists alike, the outermost among them."""
    raw = b'{"a": ' + inner + b"}"
    assert parse_object(raw, max_depth=4)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_object(raw, max_depth=3)


def test_infinity_is_taken_as_published():
    """Mamba's `time_step_limit`."""
    assert parse_object(b'{"time_step_limit": [0.0, Infinity]}')["time_step_limit"][1] == math.inf


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes):
    """An object, or a ValueError."""
    try:
        found = parse_object(raw, strict=True)
    except ValueError:
        return
    assert isinstance(found, dict)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), JSON))
def test_what_was_written_is_read(value: dict[str, object]):
    """The object that json writes."""
    assert parse_object(json.dumps(value).encode(), strict=True) == value


def test_shown_values_are_short_and_plain():
    """One line of ASCII, whatever they hold."""
    assert show("\x1b[31m\n") == repr("\x1b[31m\n")
    assert len(show("x" * 1000)) == 80


@pytest.mark.parametrize("package", [ollm_core, ollm_conformance])
def test_nobody_else_parses_json(package: ModuleType):
    """A file that a user may have from anybody is read through `untrusted_json`, or not at all."""
    root = Path(str(package.__file__)).parent
    found = [
        f"{path.relative_to(root)}: {ast.unparse(node)}"
        for path in root.rglob("*.py")
        if path.name != "untrusted_json.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.module == "json")
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads"))
    ]
    # What a process of our own is told by the one that started it, and results of the suite, whose
    # reader loads no torch and takes any fault of theirs for a wrong file.
    assert sorted(found) in (
        ["text/template_process.py: json.load(sys.stdin)"],
        ["probe.py: json.loads(path)", "results.py: json.loads(path.read_bytes())"],
    )
