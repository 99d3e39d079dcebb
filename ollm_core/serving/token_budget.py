"""How many tokens of a prompt a pass may read while others wait: as many as are computed in the
time that its weights are read, which then cost the others nothing.
"""

from __future__ import annotations

import statistics
from collections import deque

LEAST = 256
"""Where all weights are in memory, there is no reading to hide behind."""
MOST = 8192
_STEP = 64  # chunks of linear attention, too, end at multiples of it
_FEWEST = 128  # a pass over fewer tells what a pass takes, not what a token does
_PASSES, _PROMPTS = 8, 4  # that are remembered
_HIDDEN = 1.1  # of its reading: a pass that takes longer was bound by something else
_GROWTH = 2  # at once: what few tokens took says little of many


class TokenBudget:
    """Measures passes, and answers by them."""

    def __init__(self) -> None:
        self._reading: deque[float] = deque(maxlen=_PASSES)
        self._computing: deque[tuple[int, float]] = deque(maxlen=_PROMPTS)
        """Of passes over many tokens: how many, and seconds that one took."""

    def measured(
        self, num_tokens: int, seconds: float, read_seconds: float, waited_seconds: float
    ) -> None:
        """A pass over `num_tokens` took `seconds`. Weights were read for `read_seconds`, those that
        stay included, and it waited for them for `waited_seconds`.

        What it did not wait it computed. Where a device computes beside the host, the host waits
        for that, too; so the waiting of a pass that was not bound by reading counts for nothing.
        """
        self._reading.append(read_seconds)
        if num_tokens >= _FEWEST:
            is_hidden = seconds <= _HIDDEN * read_seconds
            computing = max(seconds - waited_seconds, 0.0) if is_hidden else seconds
            self._computing.append((num_tokens, computing / num_tokens))

    @property
    def tokens(self) -> int:
        """A multiple of 64, at least LEAST and at most MOST. What is known of few tokens is too
        little, and what a token takes differs by how much is before it: the answer errs on the
        small side.
        """
        if not self._computing:
            return LEAST
        each = max(seconds for _, seconds in self._computing)
        hidden = int(statistics.median_low(self._reading) / max(each, 1e-9))
        known = _GROWTH * max(num_tokens for num_tokens, _ in self._computing)
        return max(LEAST, min(hidden, known, MOST)) // _STEP * _STEP
