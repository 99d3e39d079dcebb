"""Counts what a server does, and how long its clients wait for tokens."""

from __future__ import annotations

import math
import time
from collections import Counter, deque

from ollm_core.serving.request import Event, Finished, NewToken

QUANTILES = (0.5, 0.95, 0.99)
_REMEMBERED = 4096  # times between tokens, and until first ones


class Times:
    """Seconds: of the last few thousand each, of all the number and the sum."""

    def __init__(self) -> None:
        self.number = 0
        self.sum = 0.0
        self._last: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, seconds: float) -> None:
        """One more."""
        self.number += 1
        self.sum += seconds
        self._last.append(seconds)

    def quantiles(self) -> dict[float, float]:
        """Of the last ones, by the nearest rank; empty where there is none."""
        ordered = sorted(self._last)
        ranks = ((one, max(math.ceil(one * len(ordered)), 1)) for one in QUANTILES)
        return {one: ordered[rank - 1] for one, rank in ranks if ordered}


class Meter:
    """Counts. Used in the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status; 499 where the client went away."""
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_new_tokens = 0
        self.first_token = Times()
        self.next_token = Times()


class Stopwatch:
    """The times of one client's requests, told to a meter."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._asked = time.monotonic()
        self._last: dict[tuple[str, int], float] = {}

    def count(self, event: Event) -> None:
        """Something happened to one of them."""
        key, meter = (event.request_id, event.index), self._meter
        if isinstance(event, NewToken):
            now = time.monotonic()
            meter.num_new_tokens += 1
            if key in self._last:
                meter.next_token.add(now - self._last[key])
            else:
                meter.first_token.add(now - self._asked)
            self._last[key] = now
        elif isinstance(event, Finished) and event.reason != "cancelled":
            meter.num_prompt_tokens += event.counts.num_prompt_tokens
            meter.num_cached_tokens += event.counts.num_cached_tokens
