"""How many tokens of a prompt a pass may read while others wait: as many as are computed in the
time that its weights are read, which then cost the others nothing.
"""

from __future__ import annotations

from collections import deque

LEAST = 256
"""Where all weights are in memory, there is no reading to hide behind."""
MOST = 8192
_STEP = 64  # chunks of linear attention, too, end at multiples of it
_WINDOW = 8


class TokenBudget:
    """Measures passes, and answers by them."""

    def __init__(self) -> None:
        self._passes: deque[tuple[int, float, float]] = deque(maxlen=_WINDOW)

    def measured(self, num_tokens: int, seconds: float, read_seconds: float) -> None:
        """A pass over `num_tokens` took `seconds`; weights were read for `read_seconds` of it."""
        if num_tokens:
            self._passes.append((num_tokens, seconds, read_seconds))

    @property
    def tokens(self) -> int:
        """A multiple of 64, at least LEAST and at most MOST.

        A pass takes no less than it computes and no less than it reads. So one over many tokens
        says what a token takes at most, and one over few what reading takes; where none was over
        many, what is known is too little, and the answer errs on the small side.
        """
        if not self._passes:
            return LEAST
        each = min(seconds / num_tokens for num_tokens, seconds, _ in self._passes)
        reading = min(read for _, _, read in self._passes)
        hidden = int(reading / max(each, 1e-9))
        return max(LEAST, min(hidden, MOST)) // _STEP * _STEP
