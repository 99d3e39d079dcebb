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


class Places:
    """Places for requests, running or waiting. Used in the event loop alone."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_taken = 0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A place, for the length of a `with`. Raises RefusedRequestError if there is none."""
        if self.num_taken >= self.number:
            raise RefusedRequestError(
                429,
                f"the server has {self.num_taken} requests, which is as many as it takes at once",
                code="too_many_requests",
                headers={"Retry-After": str(self.retry_after)},
            )
        self.num_taken += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self.num_taken -= 1
            self._seconds.append(time.monotonic() - began)

    @property
    def retry_after(self) -> int:
        """Seconds until a place is likely to be free, by how long requests have had theirs."""
        held = fmean(self._seconds) if self._seconds else _FIRST_GUESS * self.number
        return min(max(math.ceil(held / self.number), 1), _MOST_SECONDS)
