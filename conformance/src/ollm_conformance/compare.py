"""Comparisons that say what was expected and what was got."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError unless both tensors are equal, bit for bit."""
    _same_form(found, expected, what)
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
    _same_form(found, expected, what)
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


@contextmanager
def must_raise(error: type[BaseException], what: str) -> Iterator[None]:
    """Raises AssertionError unless the `with` block raises `error`; another one goes on."""
    try:
        yield
    except error:
        return
    raise AssertionError(f"{what}: expected {error.__name__}, got no error")


def _same_form(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: expected {expected.dtype} {list(expected.shape)}, "
            f"got {found.dtype} {list(found.shape)}"
        )
