"""Runs weight passes: one at a time, admitted before, committed and counted after.

A pass that ran out of memory is tried once more with every weight evicted that can be.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from ollm_core.contracts.kv import KeepsStates, KVStore
from ollm_core.contracts.progress import Progress
from ollm_core.engine.batch import NewTokens, num_new_tokens, stage_of
from ollm_core.engine.checkpoint import CheckpointPolicy, PassCheckpoint, checkpoint_of
from ollm_core.engine.counters import Counters
from ollm_core.engine.finite import require_finite
from ollm_core.engine.pass_planner import PassPlan, PassPlanner
from ollm_core.engine.progress import ProgressReporter
from ollm_core.engine.torch_state import own_torch_state
from ollm_core.engine.weight_pass import WeightPass
from ollm_core.errors import DoesNotFitError, one_line
from ollm_core.memory.pair import PerMemory
from ollm_core.model.skeleton import Skeleton
from ollm_core.profiling import Span, no_span
from ollm_core.weights.eviction import Eviction
from ollm_core.weights.streamer import TieredStreamer

logger = logging.getLogger("ollm")


def _no_files() -> None:
    """Weights that are in no file stay as they are."""


class Engine:
    """Runs weight passes of one model, one at a time."""

    def __init__(
        self,
        skeleton: Skeleton,
        weights: TieredStreamer,
        pass_planner: PassPlanner,
        on_progress: Callable[[Progress], None] | None = None,
        cap: Callable[[], AbstractContextManager[None]] = nullcontext,
        span: Span = no_span,
        check_files: Callable[[], None] = _no_files,
    ) -> None:
        """Owns `weights`, and binds their final norm to `skeleton`. `cap` is held during each pass:
        a limit that the device's allocator keeps. `check_files` raises ReadError if the weights are
        not those any more that were opened: what a pass has computed counts only after that.
        """
        skeleton.bind_norm(weights.norm)
        self.counters = Counters()
        self.checkpoints = CheckpointPolicy()
        """Which passes write how far they are, for another run to go on with."""
        self.progress = ProgressReporter(self.counters, weights, on_progress)
        self._skeleton = skeleton
        self._weights = weights
        self._pass_planner = pass_planner
        self._cap = cap
        self._check_files = check_files
        self._span = span
        self._lock = threading.RLock()

    @property
    def eviction(self) -> Eviction | None:
        """What lets kept weights give way where memory runs short, if anything does."""
        return self._pass_planner.eviction

    def close(self) -> None:
        """Free the weights, and hold nothing on the device any more."""
        with ExitStack() as stack:  # both, even if one fails
            stack.callback(self._skeleton.close)
            stack.callback(self._weights.close)

    @property
    def reading_seconds(self) -> tuple[float, float]:
        """Time that weights were read, those that stay included, and that passes waited for it."""
        return self._weights.reading_seconds

    def run(
        self,
        store: KVStore,
        work: Sequence[NewTokens],
        check: Callable[[], None] | None = None,
    ) -> list[Tensor]:
        """Logits [num_logits, V] of each item of `work`; the store then holds its new tokens.
        `check` is called after every step of the pass, which what it raises breaks off.

        Raises DoesNotFitError before anything is read, ReadError if the weights cannot be read or
        were changed, NotFiniteError for logits that are no numbers. If a pass fails or is
        interrupted, the store is as before, but that it may keep how far a long prompt was (see
        `checkpoints`).
        """
        with (
            self._lock,
            self._span(stage_of(work), num_new=num_new_tokens(work)),
            own_torch_state(),
        ):
            try:
                return self._attempt(store, work, check)
            except (torch.OutOfMemoryError, DoesNotFitError) as error:
                eviction = self.eviction
                if eviction is None or not _ran_out(error):
                    raise
                logger.warning("out of memory in a pass: %s", one_line(error))
            # Past the handler: the failed pass and what it held are gone.
            eviction.give_way()
            try:
                return self._attempt(store, work, check)
            except torch.OutOfMemoryError as error:
                raise DoesNotFitError(
                    f"out of memory with every weight evicted that can be: {one_line(error)}",
                    hint="allow less device memory, a smaller chunk size, or end other programs",
                ) from error

    def _attempt(
        self,
        store: KVStore,
        work: Sequence[NewTokens],
        check: Callable[[], None] | None,
    ) -> list[Tensor]:
        """One try of a pass."""
        start = time.perf_counter()
        read_before = store.bytes_read
        self._expect(store, work)
        with self._cap(), self._pass_planner.admit(store, work) as plan:
            # All that the pass may take is reserved.
            self.counters.count_kv_on_disk(kv_on_disk := store.tier_bytes().disk)
            self._weights.take_turns(kv_on_disk > 0)
            policy = self.checkpoints
            found = checkpoint_of(store, work, plan, self._skeleton, self._weights, policy)
            checkpoint = PassCheckpoint(found, policy, self._check_files)
            logits = self._run(store, work, plan, check, checkpoint)
            with checkpoint.dropped_if_it_fails():
                self._check_files()
                require_finite(logits)
            for item in work:
                store.commit(item.sequence)
            checkpoint.finish()
        seconds, kv_bytes_read = time.perf_counter() - start, store.bytes_read - read_before
        self.counters.count_pass(work, plan, seconds, kv_bytes_read)
        return logits

    def fits(self, store: KVStore, work: Sequence[NewTokens]) -> bool:
        """Whether there is memory for a pass over `work`; of its tokens only the number counts."""
        with self._lock, own_torch_state():
            self._expect(store, work)
            return self._pass_planner.fits(store, work)

    def set_aside(self, kind: str, num_bytes: PerMemory[int]) -> None:
        """Reserve memory for what stands beside the model, between passes; kept weights give way to
        it. Raises DoesNotFitError with nothing reserved.
        """
        with self._lock:
            self._pass_planner.set_aside(kind, num_bytes)

    def demand_room(self, store: KVStore, lengths: Sequence[int]) -> None:
        """Raises DoesNotFitError if there is no memory for the pass that takes new sequences to
        their `lengths`, so that a run does not find out when it gets there.
        """
        work: list[NewTokens] = []
        with self._lock, own_torch_state(), ExitStack() as stack:
            ids = torch.zeros(1, dtype=torch.long)
            for length in lengths:
                work.append(NewTokens(store.new_sequence(), ids, length - 1))
                stack.callback(store.release, work[-1].sequence)
            self._pass_planner.choose(store, work)

    def _expect(self, store: KVStore, work: Sequence[NewTokens]) -> None:
        if isinstance(store, KeepsStates):
            for item in work:
                store.expect(item.sequence, item.num_drafted)

    def _run(
        self,
        store: KVStore,
        work: Sequence[NewTokens],
        plan: PassPlan,
        check: Callable[[], None] | None,
        checkpoint: PassCheckpoint,
    ) -> list[Tensor]:
        return WeightPass(
            self._skeleton,
            self._weights,
            store,
            work,
            plan,
            progress=self.progress,
            eviction=self.eviction,
            span=self._span,
            checkpoint=checkpoint,
            check=check,
        ).run()


def _ran_out(error: BaseException) -> bool:
    """Whether an allocation failed that the accounts had allowed."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        error.__cause__, torch.OutOfMemoryError
    )
