"""Parses JSON from untrusted files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def parse_object(raw: bytes, *, strict: bool = False) -> dict[str, Any]:
    """The UTF-8 JSON object in `raw`. Raises ValueError, with a reason of one line, for anything
    else.

    `strict` also refuses a name that is there twice, text with lone surrogates, NaN and Infinity.
    Without it they are taken as Python takes them, and so transformers: some published config.json
    have an Infinity.
    """
    options: dict[str, Any] = {}
    if strict:
        options = {"object_pairs_hook": _unique, "parse_constant": _refuse_constant}
    try:
        parsed = json.loads(raw.decode("utf-8"), **options)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return parsed


def show(value: object) -> str:
    """A value from a file, safe on one line of a terminal."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # a lone surrogate is no Unicode text: raises a ValueError
        if key in result:
            raise ValueError(f"{show(key)} is there twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
