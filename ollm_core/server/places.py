"""How many requests a server takes at once, and when one that is told to go may come again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

from ollm_core.server.errors import RefusedRequestError

_MOST_SECONDS = 600
_FIRST_GUESS = 5.0
_REMEMBERED = 32


class Place:
    """One request's."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.num_bytes = 0

    def hold(self, num_bytes: int) -> None:
        """So much more of its body is in memory. Raises RefusedRequestError if there is no room."""
        self._places.hold(num_bytes)
        self.num_bytes += num_bytes


class Places:
    """Places for requests, running or waiting, and room for their bodies. Used in the event loop
    alone.
    """

    def __init__(self, number: int, max_bytes: int) -> None:
        """`max_bytes` are the most of all bodies together."""
        self.number = number
        self.num_taken = 0
        self._bytes_left = max_bytes
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def taken(self) -> Iterator[Place]:
        """A place, for the length of a `with`. Raises RefusedRequestError if there is none."""
        if self.num_taken >= self.number:
            raise self._full(f"{self.num_taken} requests")
        self.num_taken += 1
        began, place = time.monotonic(), Place(self)
        try:
            yield place
        finally:
            self.num_taken -= 1
            self._bytes_left += place.num_bytes
            self._seconds.append(time.monotonic() - began)

    def hold(self, num_bytes: int) -> None:
        """Called by a place."""
        if num_bytes > self._bytes_left:
            raise self._full("requests of so many bytes")
        self._bytes_left -= num_bytes

    def _full(self, having: str) -> RefusedRequestError:
        return RefusedRequestError(
            429,
            f"the server has {having}, which is as many as it takes at once",
            code="too_many_requests",
            headers={"Retry-After": str(self.retry_after)},
        )

    @property
    def retry_after(self) -> int:
        """Seconds until a place is likely to be free, by how long requests have had theirs."""
        held = fmean(self._seconds) if self._seconds else _FIRST_GUESS * self.number
        return min(max(math.ceil(held / self.number), 1), _MOST_SECONDS)
