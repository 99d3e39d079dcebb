"""When a pass writes how far it is, and what must be alike for another run to go on with it."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor

from ollm_core.contracts.kv import Checkpoint, KeepsCheckpoints, KVStore
from ollm_core.engine.batch import NewTokens, stage_of
from ollm_core.engine.pass_planner import PassPlan
from ollm_core.model.skeleton import Skeleton
from ollm_core.weights.streamer import TieredStreamer

_BYTES_PER_SECOND = 500e6
"""Of writing, until it has been measured."""


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """Which passes write how far they are, and how often."""

    least_tokens: int = 1024
    """New tokens of a pass: shorter ones never do."""
    after_seconds: float = 10.0
    """A pass that is through before has written nothing."""
    share: float = 0.03
    """Of its time, the most that it writes."""


class PassCheckpoint:
    """That of one pass. It does nothing where a pass cannot be gone on with."""

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        policy: CheckpointPolicy,
        check_files: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`check_files` raises ReadError if the weights are not those any more that were opened."""
        self._checkpoint = checkpoint
        self._policy = policy
        self._check_files = check_files
        self._clock = clock
        self._begun = self._written = clock()
        self._rate = _BYTES_PER_SECOND
        self.first_layer = checkpoint.num_done if checkpoint else 0
        """Where the pass begins."""
        self.saved_layers = self.first_layer
        """Those that another run would not compute again."""

    def restore(self, hidden: list[Tensor]) -> None:
        """Put hidden states before `first_layer` in place of those before layer 0. Raises ReadError
        or DamagedKVError.
        """
        if self._checkpoint is not None and self.first_layer:
            self._checkpoint.restore(hidden)

    def after_layer(self, num_done: int, hidden: Sequence[Tensor]) -> None:
        """So many layers are done, and `hidden` is what they gave. Raises ReadError if the weights
        were changed.
        """
        now, num_bytes = self._clock(), sum(one.nbytes for one in hidden)
        if (
            self._checkpoint is None
            or now - self._begun < self._policy.after_seconds
            or (now - self._written) * self._policy.share < num_bytes / self._rate
        ):
            return
        with self.dropped_if_it_fails():
            self._check_files()
        if hidden[0].is_cuda:  # what it waits for otherwise would be taken for writing
            torch.cuda.synchronize(hidden[0].device)
        begin = self._clock()
        if self._checkpoint.save(num_done, hidden):
            self.saved_layers = num_done
        self._written = self._clock()
        self._rate = num_bytes / max(self._written - begin, 1e-6)

    def finish(self) -> None:
        """The pass is through and committed."""
        if self._checkpoint is not None:
            self._checkpoint.finish()

    @contextmanager
    def dropped_if_it_fails(self) -> Iterator[None]:
        """What the pass gave is of no use if something is raised in the `with` block."""
        try:
            yield
        except Exception:
            if self._checkpoint is not None:
                self._checkpoint.drop()
            raise


def checkpoint_of(
    store: KVStore,
    work: Sequence[NewTokens],
    plan: PassPlan,
    skeleton: Skeleton,
    weights: TieredStreamer,
    policy: CheckpointPolicy,
) -> Checkpoint | None:
    """That of a pass over the prompt of one sequence, if it can be gone on with."""
    if not isinstance(store, KeepsCheckpoints) or len(work) != 1:
        return None
    [item] = work
    if (
        not item.kept
        or item.num_drafted
        or len(item.token_ids) < policy.least_tokens
        or stage_of(work) != "prefill"
        or not can_go_on(skeleton)
    ):
        return None
    own = skeleton.own
    dtypes = {weights.dtype} if own is None else own.facts.hidden_dtypes
    settings = bits_depend_on(plan, skeleton, weights.device)
    return store.checkpoint(item.sequence, item.token_ids, settings, dtypes)


def can_go_on(skeleton: Skeleton) -> bool:
    """Whether hidden states, and what layers remember, are all that the layers not done need: what
    else they hand on is nowhere written.
    """
    own = skeleton.own
    return own is None or not (own.facts.shared or own.facts.handed)


def bits_depend_on(plan: PassPlan, skeleton: Skeleton, device: torch.device) -> Mapping[str, Any]:
    """All that the bits of a pass depend on beside the model, its dtype and the tokens."""
    products = skeleton.products
    return {
        **_software(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "float32 products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "own forward": skeleton.own is not None,
        "products": None if products is None else [products.small_batch is not None],
        "attention": plan.attention,
        "chunks": [[one.begin, one.end] for one in plan.chunks],
    }


@functools.cache
def _software() -> Mapping[str, Any]:
    """Versions, and what of this processor torch's kernels go by."""
    return {
        "versions": [version("ollm-core"), torch.__version__, transformers.__version__],
        "processor": [
            platform.machine(),
            torch.backends.cpu.get_cpu_capability(),
            torch.cpu._is_avx512_bf16_supported(),
            torch.cpu._is_amx_tile_supported(),
        ],
    }
