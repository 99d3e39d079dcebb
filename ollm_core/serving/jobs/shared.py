"""Batches beside other requests: their rows run in a session that others ask, too."""

from __future__ import annotations

import copy
import queue
from dataclasses import replace

from ollm_core.contracts.closing import Closing
from ollm_core.errors import OllmError
from ollm_core.serving.model import ServedModel
from ollm_core.serving.request import Event, Failed, Finished, Request
from ollm_core.serving.session import EventStream, Session


class StoppedError(OllmError):
    """A batch was told to end. Its rows that have no answer are left to the next run."""


class SharedSteps(Closing):
    """What a batch takes for a scheduler. Its requests are cancelled when it is closed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._streams: dict[str, EventStream] = {}
        self._told: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. Raises OllmError if the session is closed."""
        request_id = request.request_id
        self._streams[request_id] = self._session.submit(
            request, lambda: self._told.put(request_id)
        )

    def step(self) -> list[Event]:
        """Wait for something to happen; -> what has. Raises StoppedError if `stop` was called, or
        if what has happened is the end of the session.
        """
        events: list[Event] = []
        while not events or not self._told.empty():
            request_id = self._told.get()
            if request_id is None:
                raise StoppedError("the batch was stopped")
            event = self._streams[request_id].get(timeout=0)
            assert event is not None
            is_cancelled = isinstance(event, Finished) and event.reason == "cancelled"
            if is_cancelled or (isinstance(event, Failed) and not self._session.is_open):
                raise StoppedError("the session has ended")
            events.append(event)
        return events

    def stop(self) -> None:
        """Let `step` raise. From any thread."""
        self._told.put(None)

    def close(self) -> None:
        """Cancel what has not ended. May be called twice."""
        for stream in self._streams.values():
            stream.close()


class SharedModel:
    """A model whose session others ask, too, as a batch needs one; for one run of one batch."""

    def __init__(self, served: ServedModel, session: Session) -> None:
        # Of its own: what marks control tokens changes a tokenizer for a moment, while the thread
        # of the session decodes with the model's.
        self.served = replace(served, tokenizer=copy.deepcopy(served.tokenizer))
        self._steps = SharedSteps(session)

    def open_scheduler(self, num_tokens: int = 0) -> SharedSteps:
        """That of the session: there is one store for all, whatever a batch expects."""
        return self._steps

    def stop(self) -> None:
        """End the run. From any thread."""
        self._steps.stop()
