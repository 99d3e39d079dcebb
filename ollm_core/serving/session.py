"""A scheduler with a thread of its own: any thread may submit requests and read their events."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator

from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.device.openmp import release_openmp_threads
from ollm_core.errors import OllmError
from ollm_core.serving.request import Event, Failed, Finished, Request, SamplingParams
from ollm_core.serving.scheduler import Scheduler


class SessionClosedError(OllmError):
    """Nothing more can be asked of a session, and what was asked is not answered."""

    def __init__(self) -> None:
        super().__init__("the session is closed", hint="open another one")


class EventStream(Iterator[Event]):
    """The events of one request, in their order; it ends after the last one. Closing it, or
    dropping it, cancels the request.
    """

    def __init__(
        self,
        request: Request,
        cancel: Callable[[str], None],
        on_event: Callable[[], None] = lambda: None,
    ) -> None:
        self.request_id = request.request_id
        wanted = request.wanted
        answers = range(wanted.n if isinstance(wanted, SamplingParams) else 1)
        self._open = set(answers)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancel = weakref.finalize(self, cancel, request.request_id)
        self._cancel.atexit = False
        self._on_event = on_event

    def __next__(self) -> Event:
        """Waits for the next event."""
        event = self.get()
        assert event is not None
        return event

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None after `timeout` seconds without one. Raises StopIteration after the
        last one.
        """
        if not self._open:
            raise StopIteration
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(event, Finished | Failed):
            self._open.discard(event.index)
            if not self._open:
                self._cancel.detach()
        return event

    def close(self) -> None:
        """Cancel the request, if it has not ended. May be called twice, from any thread."""
        self._cancel()

    @property
    def is_closed(self) -> bool:
        """Whether nobody waits for more."""
        return not self._cancel.alive

    def put(self, event: Event) -> None:
        """Called by the session."""
        self._events.put(event)
        self._on_event()

    def fail(self, error: Exception) -> None:
        """Called by the session: end all answers that have not ended."""
        for index in [*self._open]:
            self.put(Failed(self.request_id, index, error))


class Session(Closing):
    """Runs a scheduler in its own thread, until it is closed."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Owns `scheduler`."""
        self._scheduler = scheduler
        self._new: queue.SimpleQueue[tuple[Request, EventStream] | None] = queue.SimpleQueue()
        self._streams: weakref.WeakValueDictionary[str, EventStream] = weakref.WeakValueDictionary()
        self._closed = False
        self._lock = threading.Lock()
        release_openmp_threads()  # of the thread that has opened the model: another computes now
        # Not by the name of the library's own threads: it may wait for them.
        self._thread = threading.Thread(target=self._work, name="serving", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether more can be asked: it was not closed, and nothing has broken it."""
        return not self._closed

    @property
    def num_waiting(self) -> int:
        """Texts that are in no pass yet."""
        return self._new.qsize() + self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Texts that take part in passes."""
        return self._scheduler.num_running

    def num_read(self, request_id: str) -> int | None:
        """Tokens of a request that are read, of the text of it that has most; None while it waits
        for its first pass, and after its end. From any thread.
        """
        return self._scheduler.num_read(request_id)

    def cached(self) -> list[tuple[tuple[int, int], Tensor]]:
        """Texts whose beginnings a request need not compute again, the newest last: what tells
        them apart, and their token ids, int32 [T]. From any thread.
        """
        return self._scheduler.cached()

    def submit(self, request: Request, on_event: Callable[[], None] = lambda: None) -> EventStream:
        """Let a request wait for its turn; its events come in the stream, a refusal too. Raises
        SessionClosedError.

        `on_event` is called after each of them, in the thread of the session: for readers who
        cannot wait in `get`. It must be quick, and raise nothing.
        """
        stream = EventStream(request, self._scheduler.cancel, on_event)
        with self._lock:
            if self._closed:
                raise SessionClosedError
            self._new.put((request, stream))
        return stream

    def close(self) -> None:
        """Cancel what runs, end the thread, and close the scheduler. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._new.put(None)
        for stream in list(self._streams.values()):
            stream.close()
        self._thread.join()

    def _work(self) -> None:
        error: Exception = SessionClosedError()
        try:
            while self._take_new():
                for event in self._scheduler.step():
                    if stream := self._streams.get(event.request_id):
                        stream.put(event)
        except Exception as broken:  # noqa: BLE001 # each request is told
            error = broken
        finally:
            with self._lock:
                self._closed = True
            for stream in list(self._streams.values()):
                stream.fail(error)
            while not self._new.empty():
                if (taken := self._new.get()) is not None:
                    taken[1].fail(error)
            self._scheduler.close()

    def _take_new(self) -> bool:
        """Hand on what was submitted, and wait for it where there is nothing else to do. False: the
        session is being closed.
        """
        while not self._new.empty() or self._scheduler.is_idle:
            taken = self._new.get()
            if taken is None:
                return False
            request, stream = taken
            if stream.is_closed:
                continue
            self._hand_on(request, stream)
        return not self._closed

    def _hand_on(self, request: Request, stream: EventStream) -> None:
        self._streams[request.request_id] = stream
        try:
            self._scheduler.add(request)
        except OllmError as error:
            stream.fail(error)
        if stream.is_closed:  # meanwhile, when there was nothing to cancel yet
            self._scheduler.cancel(request.request_id)
