"""Whether transformers is as it was: its tables of functions, its base class, and what the module
of a family holds; and what becomes of an object that its caller changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_MARK = "changed by its caller"
_TABLES = ALL_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS


@contextmanager
def untouched(modeling: str) -> Iterator[None]:
    """Raises AssertionError if the `with` block changes transformers or its module `modeling`.

    What core registers in the tables, as it may, is no change.
    """
    before = _picture(modeling)
    yield
    after = _picture(modeling)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if changed:
        raise AssertionError(
            f"expected transformers untouched, got changes to {', '.join(sorted(changed)[:5])}"
        )


def _picture(modeling: str) -> dict[str, int]:
    """What there is, by identity."""
    held = dict(vars(sys.modules[modeling]))
    holders: dict[str, dict[str, object]] = {modeling: held}
    for thing in (PreTrainedModel, *held.values()):
        if isinstance(thing, type):
            holders[thing.__name__] = dict(vars(thing))
    for table in _TABLES:
        functions = {key: table[key] for key in table}
        holders[type(table).__name__] = {
            key: value
            for key, value in functions.items()
            if not value.__module__.startswith("ollm_core.")
        }
    return {
        f"{holder}.{key}": id(value)
        for holder, things in holders.items()
        for key, value in things.items()
        if not key.startswith("__")
    }


@contextmanager
def spoiled(values: object) -> Iterator[None]:
    """In the block every dict and list in `values`, at any depth, has one thing more."""
    found = list(_containers(values))
    for one in found:
        if isinstance(one, dict):
            one[_MARK] = True
        else:
            one.append(_MARK)
    try:
        yield
    finally:
        for one in found:
            if isinstance(one, dict):
                one.pop(_MARK, None)
            elif _MARK in one:
                one.remove(_MARK)


def _containers(value: object) -> Iterator[dict[Any, Any] | list[Any]]:
    """Each dict and list, once however often it is reached."""
    seen: dict[int, dict[Any, Any] | list[Any]] = {}
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        if isinstance(one, dict | list):
            seen[id(one)] = one
    yield from seen.values()
