"""Converts the values that users pass (sizes, counts, dtypes, devices) to one form.

Loads no torch before it is needed.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias

from ollm_core.errors import InputError

if TYPE_CHECKING:
    import torch

PathLike: TypeAlias = str | os.PathLike[str]
Count: TypeAlias = SupportsIndex
"""An int, or one of numpy's."""
Size: TypeAlias = str | float | SupportsIndex
"""`8GB`, `512MiB` or a whole number of bytes; see `parse_size`."""
DType: TypeAlias = "str | torch.dtype"
Device: TypeAlias = "str | SupportsIndex | torch.device"

DTYPES = ("float32", "float16", "bfloat16")
"""What a model may compute in."""

_TOKENS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*")


def one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    """Raises InputError for an option's value that is not among those `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{what} is {value!r}", hint=f"one of: {', '.join(allowed)}")


def count(what: str, value: Count, least: int) -> int:
    """A number of things. Raises InputError for what is no int, and for fewer than `least`."""
    number = whole_number(value)
    if number is None or number < least:
        raise InputError(
            f"{what} is {value!r}, expected at least {least}", hint="give a whole number"
        )
    return number


def whole_number(value: object) -> int | None:
    """The int that `value` is, or None; True is none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type] # that is what is tried
    except TypeError:
        return None


def parse_tokens(text: str | Count) -> int:
    """A number of tokens from `100k` (100,000), `1M`, or a plain number. Raises InputError."""
    match = _TOKENS.fullmatch(str(text))
    number = 0
    if match:
        number = int(Decimal(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2].lower()])
    if number < 1:
        raise InputError(
            f"{str(text)!r} is not a number of tokens", hint="write it as in 8192 or 100k"
        )
    return number


def dtype_name(dtype: DType | None) -> str:
    """ "auto", also for None, or one of DTYPES, from that, a `torch.dtype` or a name that torch has
    for it. Raises InputError.
    """
    import torch

    name = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    known = getattr(torch, name, None)
    if isinstance(known, torch.dtype):
        name = str(known).removeprefix("torch.")
    if name not in ("auto", *DTYPES):
        raise InputError(f"dtype is {dtype!r}", hint=f"one of: auto, {', '.join(DTYPES)}")
    return name


def device_name(device: Device) -> str:
    """As `cuda:0`, from a name, a `torch.device`, or the index of a GPU, -1 for the CPU. Raises
    InputError.
    """
    if isinstance(device, str):
        return device
    import torch

    if isinstance(device, torch.device):
        return str(device)
    index = whole_number(device)
    if index is None or index < -1:
        raise InputError(f"device is {device!r}", hint="name it as in 'cpu' or 'cuda:0'")
    return "cpu" if index == -1 else f"cuda:{index}"
