"""How long a prompt will take to be read, by the plan: made for a few lengths before a server
listens, since a plan beside weight passes would take their processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

FIRST = 256
"""Tokens of the shortest prompt that is planned; each next one has four times as many."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one prompt."""

    num_tokens: int
    seconds: float
    """Until its first token, if it runs alone."""
    fits: bool
    """In the memory limits."""
    pass_seconds: float = 0.0
    """Of each pass after that, which makes a token."""
    is_guess: bool = False
    """The machine was not measured."""
    disk_bytes_per_second: float = 0.0
    """What the disk was measured to give; 0.0 where it was not."""


class Forecasts:
    """Those of any length, between the ones that were planned."""

    def __init__(self, planned: Sequence[Forecast] = ()) -> None:
        """`planned` are in the order of their lengths."""
        self._planned = [Forecast(0, 0.0, True), *planned]

    @property
    def disk_bytes_per_second(self) -> float:
        """What the disk was measured to give; 0.0 where it was not."""
        return self._planned[-1].disk_bytes_per_second

    def of(self, num_tokens: int, num_kept: int = 0) -> Forecast | None:
        """One of a prompt of so many tokens, of which the first `num_kept` were read before; None
        past the longest that was planned.
        """
        whole, kept = self._at(num_tokens), self._at(num_kept)
        if not num_kept or whole is None or kept is None:
            return whole
        # What is left is read in a pass, which also reads what is kept.
        return replace(whole, seconds=max(whole.seconds - kept.seconds, whole.pass_seconds))

    def _at(self, num_tokens: int) -> Forecast | None:
        for shorter, longer in pairwise(self._planned):
            if num_tokens <= longer.num_tokens:
                share = (num_tokens - shorter.num_tokens) / (longer.num_tokens - shorter.num_tokens)
                seconds = shorter.seconds + share * (longer.seconds - shorter.seconds)
                return replace(longer, num_tokens=num_tokens, seconds=seconds)
        return None


def make_forecasts(most: int, plan: Callable[[int], Forecast | None]) -> Forecasts:
    """Plan prompts of up to `most` tokens; a length that cannot be planned ends it."""
    lengths: list[int] = []
    while (length := FIRST * 4 ** len(lengths)) < most:
        lengths.append(length)
    planned = []
    for length in [*lengths, most]:
        found = plan(length)
        if found is None:
            break
        planned.append(found)
    return Forecasts(planned)
