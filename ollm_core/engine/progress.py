"""Reports the progress of a weight pass, or of hashing the model's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    ) -> Callable[[], None]:
        """A pass of `total` reports begins; what is returned makes one, after `check`.
        `given_up_bytes` of weights are not kept in it.
        """
        stage, num_new, done = stage_of(work), num_new_tokens(work), -1

        def report() -> None:
            nonlocal done
            done += 1
            if check:
                check()
            if self.on_progress:
                counters, num_bytes = self._counters, self._weights.bytes_read
                passes = counters.counted.weight_passes
                self.on_progress(
                    Progress(stage, done, total, num_new, passes, num_bytes, given_up_bytes)
                )

        report()
        return report
