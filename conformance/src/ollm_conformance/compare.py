"""Comparisons that say what was expected and what was got."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor


def same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError unless both tensors are equal, bit for bit."""
    same_form(found, expected, what)
    if torch.equal(found, expected):
        return
    wrong = (found != expected).flatten()
    first = int(wrong.nonzero()[0]) if bool(wrong.any()) else 0
    place = [int(i) for i in torch.unravel_index(torch.tensor(first), found.shape)]
    worst = float((found.double() - expected.double()).abs().max())
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ, the first at {place}: "
        f"expected {float(expected[tuple(place)])!r}, got {float(found[tuple(place)])!r} "
        f"(largest difference {worst:.3g})"
    )


def same_within(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raises AssertionError where a difference is above `tolerance` of the expected scale."""
    same_form(found, expected, what)
    scale = float(expected.abs().max())
    worst = float((found.double() - expected.double()).abs().max())
    if not worst <= tolerance * scale:  # NaN is no agreement
        raise AssertionError(
            f"{what}: expected a difference of at most {tolerance:g} of the scale {scale:.3g}, "
            f"got {worst:.3g}"
        )


def same_tokens(found: list[int], expected: list[int], what: str) -> None:
    """Raises AssertionError at the first token that differs."""
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            raise AssertionError(f"{what}: token {place}: expected {other}, got {one}")
    if len(found) != len(expected):
        raise AssertionError(f"{what}: expected {len(expected)} tokens, got {len(found)}")


def same_form(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError unless both tensors have one shape and one dtype."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: expected {expected.dtype} {list(expected.shape)}, "
            f"got {found.dtype} {list(found.shape)}"
        )


class Refusal(AbstractContextManager["Refusal"]):
    """What `refused` gives out. After the `with` block, `error` is what the block raised."""

    error: BaseException

    def __init__(self, expected: type[BaseException], what: str) -> None:
        self._expected = expected
        self._what = what

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        name = self._expected.__name__
        wanted = f"{self._what}: expected {'an' if name[0] in 'AEIOU' else 'a'} {name}"
        if exc is None:
            raise AssertionError(f"{wanted}, got no error")
        if isinstance(exc, self._expected):
            self.error = exc
            return True
        if isinstance(exc, AssertionError) or not isinstance(exc, Exception):
            return False  # speaks for itself, or is Ctrl-C
        raise AssertionError(f"{wanted}, got {type(exc).__name__}: {exc}") from exc

    def says(self, words: str) -> None:
        """Raises AssertionError unless the error's message holds `words`."""
        if words not in str(self.error):
            raise AssertionError(
                f"{self._what}: expected an error that says {words!r}, got: {self.error}"
            )


def refused(expected: type[BaseException], what: str) -> Refusal:
    """Raises AssertionError unless its `with` block raises `expected`. `what` names what should
    have been refused: entry, tensor, row, size.
    """
    return Refusal(expected, what)
