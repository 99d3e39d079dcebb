"""Profile: where the time of a run goes, by thread and name, and as a trace for Perfetto."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ollm_core.contracts.tensors import TensorInfo
from ollm_core.contracts.weights import ByteSource
from ollm_core.errors import InputError

Span = Callable[..., AbstractContextManager[None]]
"""span(name, **numbers): a context whose length counts under `name`."""

READING = "read"
"""The span of a reading engine's call."""
_MAX_EVENTS = 1_000_000


_NOTHING = nullcontext()


def no_span(name: str, **numbers: int) -> AbstractContextManager[None]:
    """Measures nothing."""
    return _NOTHING


@dataclass(slots=True)
class Total:
    """All spans of one name inside those of one outermost name."""

    calls: int = 0
    seconds: float = 0.0
    """Without the spans inside: totals add up to what is outermost."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Sums of what the spans were given."""


@dataclass(slots=True)
class _Open:
    name: str
    inside_ns: int = 0


@dataclass(frozen=True, slots=True)
class _Event:
    name: str
    thread: str
    begin_ns: int
    end_ns: int
    numbers: dict[str, int]


class Profile:
    """Spans of one model, from any of its threads."""

    def __init__(
        self,
        clock: Callable[[], int] = time.perf_counter_ns,
        max_events: int = _MAX_EVENTS,
    ) -> None:
        """`clock` gives nanoseconds. Spans beyond `max_events` are summed, but not in the trace."""
        self.totals: dict[tuple[str, str], Total] = {}
        """By outermost span and span."""
        self._clock = clock
        self._max_events = max_events
        self._events: list[_Event] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    @contextmanager
    def span(self, name: str, **numbers: int) -> Iterator[None]:
        """Count the length of a `with` block; `numbers` are summed, and told in the trace."""
        opened: list[_Open] = self._local.__dict__.setdefault("opened", [])
        opened.append(_Open(name))
        begin = self._clock()
        try:
            yield
        finally:
            end = self._clock()
            outermost, this = opened[0].name, opened.pop()
            if opened:
                opened[-1].inside_ns += end - begin
            with self._lock:
                total = self.totals.setdefault((outermost, name), Total())
                total.calls += 1
                total.seconds += (end - begin - this.inside_ns) / 1e9
                for key, number in numbers.items():
                    total.numbers[key] = total.numbers.get(key, 0) + number
                if len(self._events) < self._max_events:
                    thread = threading.current_thread().name
                    self._events.append(_Event(name, thread, begin, end, numbers))

    def reading(self, source: ByteSource) -> ByteSource:
        """The same reading engine, its calls being measured."""
        return _ProfiledSource(source, self)

    def seconds(self, outermost: str) -> float:
        """Of all spans of this name that were in no other one."""
        return sum(total.seconds for (name, _), total in self.totals.items() if name == outermost)

    def write(self, path: Path) -> None:
        """A file in Chrome's trace event format, which https://ui.perfetto.dev opens; times in
        microseconds. Raises InputError if it cannot be written.
        """
        threads = sorted({event.thread for event in self._events})
        named: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": i, "args": {"name": thread}}
            for i, thread in enumerate(threads)
        ]
        start = min((event.begin_ns for event in self._events), default=0)
        spans: list[dict[str, object]] = [
            {
                "name": event.name,
                "ph": "X",
                "pid": 1,
                "tid": threads.index(event.thread),
                "ts": (event.begin_ns - start) / 1e3,
                "dur": (event.end_ns - event.begin_ns) / 1e3,
                "args": event.numbers,
            }
            for event in self._events
        ]
        try:
            path.write_text(json.dumps({"traceEvents": [*named, *spans], "displayTimeUnit": "ms"}))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error


class _ProfiledSource(ByteSource):
    """Another reading engine, each call in a span."""

    def __init__(self, source: ByteSource, profile: Profile) -> None:
        self.name = source.name
        self._source = source
        self._profile = profile

    def read(self, tensors: Sequence[TensorInfo], buffer: memoryview) -> Sequence[int]:
        num_bytes = self._source.buffer_bytes(tensors)
        with self._profile.span(READING, num_bytes=num_bytes):
            return self._source.read(tensors, buffer)

    def buffer_bytes(self, tensors: Sequence[TensorInfo]) -> int:
        return self._source.buffer_bytes(tensors)

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def take_turns(self, with_others: bool) -> None:
        self._source.take_turns(with_others)

    def close(self) -> None:
        self._source.close()
