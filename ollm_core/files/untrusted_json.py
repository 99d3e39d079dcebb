"""Parses JSON from untrusted files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def parse_object(
    raw: bytes, *, strict: bool = False, max_depth: int | None = None
) -> dict[str, Any]:
    """The UTF-8 JSON object in `raw`. Raises ValueError, with a reason of one line, for anything
    else.

    `strict` also refuses a name that is there twice, text with lone surrogates, NaN and Infinity.
    Without it they are taken as Python takes them, and so transformers: some published config.json
    have an Infinity. `max_depth` refuses objects and lists in more of each other: who walks through
    them need not fear how deep they are.
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
    if max_depth is not None and depth(parsed, max_depth) > max_depth:
        raise ValueError("JSON nested too deeply")
    return parsed


def show(value: object) -> str:
    """A value from a file, safe on one line of a terminal."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def depth(value: object, most: int) -> int:
    """How many objects and lists are in each other; it stops counting after `most`."""
    level, depth = [value], 0
    while level and depth <= most:
        inner = [one for one in level if isinstance(one, dict | list)]
        depth += bool(inner)
        level = [
            child for one in inner for child in (one.values() if isinstance(one, dict) else one)
        ]
    return depth


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
