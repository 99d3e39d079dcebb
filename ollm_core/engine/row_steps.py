"""Numbers of rows that stand for fewer, where it is asked what rows with one new token each take.

What an operation takes is a line in the rows, and grows with them, but where another kernel is
chosen: those for few rows may hold what those for more do not. All of them end at a number that is
not rounded up past here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ollm_core.engine.traced_cache import Sharing

EACH = 8
"""Up to it no number stands for another."""
UNIT = 64
"""From here on kernels change at multiples of it alone; below at powers of two."""


def row_steps(num_rows: int) -> Iterator[int]:
    """Steps to round up to, coarse ones first. The last is 1: nothing is rounded."""
    step, last = UNIT, 0
    while step > 1:
        rounded = round_rows(num_rows, step)
        if rounded not in (last, num_rows):
            yield step
        step, last = step // 2, rounded
    yield 1


def round_rows(num_rows: int, step: int) -> int:
    """A number of rows that take as much as `num_rows` at least."""
    if num_rows <= EACH or step == 1:
        return num_rows
    rounded = -(-num_rows // step) * step
    if num_rows > UNIT:
        return rounded
    power: int = 1 << (num_rows - 1).bit_length()
    return min(rounded, power)


def round_sharing(sharing: Sharing, step: int) -> Sharing:
    """The same of rows that are not packed, and share stored blocks."""
    runs = tuple(tuple(range(round_rows(len(rows), step))) for rows in sharing.runs)
    return replace(sharing, runs=runs)
