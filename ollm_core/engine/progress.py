"""Reports the progress of a weight pass, or of hashing the model's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ollm_core.contracts.progress import Progress
from ollm_core.engine.batch import NewTokens, num_new_tokens, stage_of
from ollm_core.engine.counters import Counters
from ollm_core.weights.streamer import TieredStreamer


class ProgressReporter:
    """Sends each Progress to `on_progress`, which may be set at any time; None: to nobody."""

    def __init__(
        self,
        counters: Counters,
        weights: TieredStreamer,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.on_progress = on_progress
        self._counters = counters
        self._weights = weights

    def checked(self, bytes_done: int, bytes_total: int) -> None:
        """So many bytes of the model's files have been hashed."""
        if self.on_progress:
            passes = self._counters.counted.weight_passes
            self.on_progress(Progress("check", bytes_done, bytes_total, 0, passes, bytes_done))

    def begin(
        self,
        work: Sequence[NewTokens],
        total: int,
        given_up_bytes: int,
        check: Callable[[], None] | None = None,
        num_layers: int = 0,
    ) -> PassReport:
        """A pass of `total` reports over `num_layers` begins; what is returned makes one, after
        `check`. `given_up_bytes` of weights are not kept in it.
        """
        first = Progress(
            stage_of(work), 0, total, num_new_tokens(work), 0, 0, given_up_bytes, num_layers
        )
        report = PassReport(self._send, first, check)
        report()
        return report

    def _send(self, progress: Progress) -> None:
        if self.on_progress:
            passes = self._counters.counted.weight_passes
            num_bytes = self._weights.bytes_read
            self.on_progress(replace(progress, weight_passes=passes, weight_bytes_read=num_bytes))


class PassReport:
    """Tells how far one pass is: a call is a step more."""

    def __init__(
        self,
        send: Callable[[Progress], None],
        first: Progress,
        check: Callable[[], None] | None,
    ) -> None:
        self._send = send
        self._check = check
        self._next = first

    def __call__(self) -> None:
        if self._check:
            self._check()
        self._send(self._next)
        self._next = replace(self._next, steps_done=self._next.steps_done + 1)

    def go_on(self, num_layers: int, num_steps: int) -> None:
        """So many layers, which are so many steps, are done already: tell it."""
        if num_layers:
            steps_done = self._next.steps_done + num_steps - 1
            self._next = replace(
                self._next,
                steps_done=steps_done,
                resumed_layers=num_layers,
                saved_layers=num_layers,
            )
            self()

    def saved(self, num_layers: int) -> None:
        """Another run would not compute so many layers again: tell it, if that is more."""
        if num_layers > self._next.saved_layers:
            self._next = replace(self._next, saved_layers=num_layers)
            self._send(replace(self._next, steps_done=self._next.steps_done - 1))
