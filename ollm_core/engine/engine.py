"""THE loop: one weight pass over a ragged list of sequences.

The engine knows layers, chunks and memory. It knows nothing about text, sampling or model families.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ollm_core.contracts.kv import KeepsStates, KVStore
from ollm_core.contracts.progress import Progress
from ollm_core.device.offload import Parking
from ollm_core.engine.batch import Chunk, NewTokens
from ollm_core.engine.finite import require_finite
from ollm_core.engine.layer_call import LayerCall
from ollm_core.engine.pass_planner import Admission, PassPlan
from ollm_core.engine.torch_state import own_torch_state
from ollm_core.errors import DoesNotFitError, one_line
from ollm_core.memory.pair import PerMemory
from ollm_core.model.outside_layers import apply
from ollm_core.model.skeleton import Skeleton
from ollm_core.profiling import Span, no_span
from ollm_core.weights.eviction import Pressure
from ollm_core.weights.streamer import TieredWeights

logger = logging.getLogger("ollm")


def _no_files() -> None:
    """Weights that are in no file stay as they are."""


@dataclass(slots=True)
class Counters:
    """What an engine has done so far."""

    weight_passes: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    undrafted_passes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    kv_bytes_read: int = 0
    kv_disk_bytes: int = 0
    last_plan: PassPlan | None = None


class Engine:
    """Runs weight passes of one model, one at a time."""

    def __init__(
        self,
        skeleton: Skeleton,
        weights: TieredWeights,
        admission: Admission,
        on_progress: Callable[[Progress], None] | None = None,
        cap: Callable[[], AbstractContextManager[None]] = nullcontext,
        span: Span = no_span,
        check_files: Callable[[], None] = _no_files,
    ) -> None:
        """`cap` is held during each pass: a limit that the device's allocator keeps. `check_files`
        raises ReadError if the weights are not those any more that were opened: what a pass has
        computed counts only after that.
        """
        self.counters = Counters()
        self._skeleton = skeleton
        self._weights = weights
        self._admission = admission
        self._cap = cap
        self._check_files = check_files
        self._span = span
        self.on_progress = on_progress
        self._lock = threading.RLock()

    @property
    def pressure(self) -> Pressure | None:
        """What notices that memory runs short, if anything does."""
        return self._admission.pressure

    def report_check(self, bytes_done: int, bytes_total: int) -> None:
        """Tell `on_progress` how many bytes of the model's files have been hashed."""
        if self.on_progress:
            passes = self.counters.weight_passes
            self.on_progress(Progress("check", bytes_done, bytes_total, 0, passes, bytes_done))

    def close(self) -> None:
        """Hold nothing on the device any more."""
        self._skeleton.close()

    def run(self, store: KVStore, work: Sequence[NewTokens]) -> list[Tensor]:
        """Logits [num_logits, V] of each item of `work`; the store then holds its new tokens.

        Raises DoesNotFitError before anything is read, ReadError if the weights cannot be read or
        were changed, NotFiniteError for logits that are no numbers. If a pass fails or is
        interrupted, the store is as before.
        """
        with (
            self._lock,
            self._span(_stage(work), num_new=sum(len(item.token_ids) for item in work)),
            own_torch_state(),
        ):
            try:
                return self._attempt(store, work)
            except (torch.OutOfMemoryError, DoesNotFitError) as error:
                pressure = self.pressure
                if pressure is None or not _ran_out(error):
                    raise
                logger.warning("out of memory in a pass: %s", one_line(error))
            # Past the handler: the failed pass and what it held are gone.
            pressure.give_way()
            try:
                return self._attempt(store, work)
            except torch.OutOfMemoryError as error:
                raise DoesNotFitError(
                    f"out of memory with nothing kept that need not be: {one_line(error)}",
                    hint="allow less device memory, a smaller chunk size, or end other programs",
                ) from error

    def _attempt(self, store: KVStore, work: Sequence[NewTokens]) -> list[Tensor]:
        """One try of a pass."""
        start = time.perf_counter()
        read_before = store.bytes_read
        self._expect(store, work)
        with self._cap(), self._admission.admit(store, work) as plan:
            on_disk = store.tier_bytes().disk  # all that the pass may take is reserved
            self.counters.kv_disk_bytes = max(self.counters.kv_disk_bytes, on_disk)
            logits = self._run(store, work, plan)
            self._check_files()
            require_finite(logits)
            for item in work:
                store.commit(item.sequence)
        self._count(store, work, plan, time.perf_counter() - start, read_before)
        return logits

    def fits(self, store: KVStore, work: Sequence[NewTokens]) -> bool:
        """Whether there is memory for a pass over `work`; of its tokens only the number counts."""
        with self._lock, own_torch_state():
            self._expect(store, work)
            return self._admission.fits(store, work)

    def set_aside(self, kind: str, num_bytes: PerMemory[int]) -> None:
        """Reserve memory for what stands beside the model, between passes; kept weights give way to
        it. Raises DoesNotFitError with nothing reserved.
        """
        with self._lock:
            self._admission.set_aside(kind, num_bytes)

    def demand_room(self, store: KVStore, lengths: Sequence[int]) -> None:
        """Raises DoesNotFitError if there is no memory for the step that takes new sequences to
        their `lengths`, so that a run does not find out when it gets there.
        """
        work: list[NewTokens] = []
        with self._lock, own_torch_state(), ExitStack() as stack:
            ids = torch.zeros(1, dtype=torch.long)
            for length in lengths:
                work.append(NewTokens(store.new_sequence(), ids, length - 1))
                stack.callback(store.release, work[-1].sequence)
            self._admission.choose(store, work)

    def _expect(self, store: KVStore, work: Sequence[NewTokens]) -> None:
        if self._skeleton.recurrent and isinstance(store, KeepsStates):
            for item in work:
                store.expect(item.sequence, item.num_drafted)

    def _run(self, store: KVStore, work: Sequence[NewTokens], plan: PassPlan) -> list[Tensor]:
        report = self._reporter(work, plan)
        device = self._weights.device
        parking = Parking(device, plan.hidden_on_host)
        hidden = [parking.park(self._embed(work, chunk)) for chunk in plan.chunks]  # [R, T, C]
        calls = [LayerCall(store, work, chunk, plan.attention, device) for chunk in plan.chunks]
        for layer_idx in range(len(self._skeleton.layers)):
            with (
                self._weights.acquire(layer_idx) as parameters,
                self._skeleton.bound(layer_idx, parameters),
            ):
                del parameters  # a name would keep copies while the next layer's are made
                step = self._skeleton.step(layer_idx)
                for i, call in enumerate(calls):
                    chunk_hidden = parking.fetch(hidden[i])
                    embeddings = self._rotary(layer_idx, chunk_hidden, call, keep=len(calls) == 1)
                    run = call.step if layer_idx in self._skeleton.recurrent else call.attend
                    with self._span("layer", layer_idx=layer_idx):
                        hidden[i] = parking.put(
                            hidden[i], run(step, layer_idx, chunk_hidden, embeddings)
                        )
                    if self.pressure:
                        self.pressure.relieve(layer_idx)
                    report()
                del chunk_hidden
                if mixture := self._skeleton.mixtures.get(layer_idx):
                    fetch = functools.partial(self._weights.experts, layer_idx)
                    with self._span("experts", layer_idx=layer_idx):
                        mixture.run(hidden, parking, fetch, report)
        return self._head(work, plan, hidden, parking, report)

    def _embed(self, work: Sequence[NewTokens], chunk: Chunk) -> Tensor:
        ids = torch.cat([work[row].token_ids[chunk.begin : chunk.end] for row in chunk.rows])
        rows = apply(self._skeleton.outside.after_embedding, self._weights.embed(ids))
        return rows.view(len(chunk.rows), chunk.num_tokens, -1)

    def _rotary(
        self, layer_idx: int, hidden: Tensor, call: LayerCall, *, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, T, D]. Made anew for each layer of a long prompt, to hold
        little.
        """
        kind = self._skeleton.rotary_types[layer_idx]
        if kind in call.embeddings:
            return call.embeddings[kind]
        rotary = self._skeleton.rotary
        embeddings = self._skeleton.embeddings(rotary, layer_idx, hidden, call.positions)
        if keep:
            call.embeddings[kind] = embeddings
        return embeddings

    def _head(
        self,
        work: Sequence[NewTokens],
        plan: PassPlan,
        hidden: Sequence[Tensor],
        parking: Parking,
        report: Callable[[], None],
    ) -> list[Tensor]:
        """Logits [num_logits, V] per item. The head is walked once, in parts, for all of them."""
        outside = self._skeleton.outside
        wanted: list[tuple[Chunk, Tensor]] = []  # normalised states [R, t, C]
        for chunk, states in zip(plan.chunks, hidden, strict=True):
            first = min(len(work[row].token_ids) - work[row].num_logits for row in chunk.rows)
            if first < chunk.end:
                normalised = self._skeleton.norm(apply(outside.before_norm, parking.fetch(states)))
                normalised = normalised[:, max(first - chunk.begin, 0) :]
                wanted.append((chunk, apply(outside.before_head, normalised)))
        parts: list[list[Tensor]] = [[] for _ in wanted]
        for unit_idx in range(len(self._skeleton.layers), len(self._weights.units)):
            with self._weights.acquire(unit_idx) as (weight,), self._span("head"):
                for part, (_, states) in zip(parts, wanted, strict=True):
                    part.append(functional.linear(states, weight))
                del weight
            report()
        found: list[list[Tensor]] = [[] for _ in work]
        for part, (chunk, _) in zip(parts, wanted, strict=True):
            logits = torch.cat(part, dim=-1) if len(part) > 1 else part[0]  # [R, t, V]
            apply(outside.after_head, logits)
            for place, row in enumerate(chunk.rows):
                found[row].append(logits[place])
        rows = [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in found]
        return [row[-item.num_logits :] for item, row in zip(work, rows, strict=True)]

    def _reporter(self, work: Sequence[NewTokens], plan: PassPlan) -> Callable[[], None]:
        num_head = len(self._weights.units) - len(self._skeleton.layers)
        num_steps = len(self._skeleton.layers) + len(self._skeleton.mixtures)
        total = num_steps * len(plan.chunks) + num_head
        stage = _stage(work)
        num_new = sum(len(item.token_ids) for item in work)
        pressure = self.pressure
        given_up = pressure.shortage.now_bytes if pressure else 0
        done = -1

        def report() -> None:
            nonlocal done
            done += 1
            if self.on_progress:
                passes, num_bytes = self.counters.weight_passes, self._weights.bytes_read
                self.on_progress(Progress(stage, done, total, num_new, passes, num_bytes, given_up))

        report()
        return report

    def _count(
        self,
        store: KVStore,
        work: Sequence[NewTokens],
        plan: PassPlan,
        seconds: float,
        read_before: int,
    ) -> None:
        counters = self.counters
        counters.weight_passes += 1
        if _stage(work) == "prefill":
            counters.prefill_tokens += sum(len(item.token_ids) for item in work)
            counters.prefill_seconds += seconds
        else:
            counters.decode_tokens += len(work)
            counters.decode_seconds += seconds
            num_drafted = sum(item.num_drafted for item in work)
            counters.drafted_tokens += num_drafted
            counters.undrafted_passes += num_drafted == 0
        counters.kv_bytes_read += store.bytes_read - read_before
        counters.last_plan = plan


def _ran_out(error: BaseException) -> bool:
    """Whether an allocation failed that the accounts had allowed."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        error.__cause__, torch.OutOfMemoryError
    )


def _stage(work: Sequence[NewTokens]) -> Literal["prefill", "decode"]:
    """Whether a pass reads a prompt. A draft is not one: it goes on from stored tokens, and all of
    its logits are wanted.
    """
    reads_prompt = any(
        len(item.token_ids) > 1 and (item.start == 0 or item.num_logits < len(item.token_ids))
        for item in work
    )
    return "prefill" if reads_prompt else "decode"
