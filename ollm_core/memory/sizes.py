"""Parses and formats sizes, such as 8GB."""

from __future__ import annotations

import numbers
import re
from decimal import Decimal

from ollm_core.errors import InputError
from ollm_core.values import Size, whole_number

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(size: Size) -> int:
    """Bytes from `8GB` (10**9), `512MiB` (2**20) or a whole number of bytes, also as 2e9.

    Raises InputError for a string without a unit, an unknown unit, what is no whole number, or a
    size below one byte.
    """
    num_bytes: int | None
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = match[2].upper() if match else ""
        known = match is not None and unit and unit in _UNITS
        num_bytes = int(Decimal(match[1]) * _UNITS[unit]) if match and known else None
    else:
        is_float = isinstance(size, numbers.Real) and not isinstance(size, numbers.Integral)
        num_bytes = int(size) if is_float and float(size).is_integer() else whole_number(size)
    if num_bytes is None or num_bytes < 1:
        few = num_bytes is not None
        hint = "it must be at least one byte" if few else "write it with a unit"
        raise InputError(f"{size!r} is not a memory size", hint=f"{hint}, as in 8GB or 512MiB")
    return num_bytes


def format_size(num_bytes: float) -> str:
    """`num_bytes` in decimal units with three digits, as in `269 MB` or `1.46 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return (
                f"{num_bytes / size:.3g} {unit}"
                if num_bytes < 999.5 * size
                else f"{num_bytes / size:.0f} {unit}"
            )
    return f"{num_bytes:.0f} B"
