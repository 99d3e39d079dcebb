"""What an opened model owns beside its calls: resources, caches, draft source, counters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ollm_core.contracts.closing import Belongings, Closing, close_outside
from ollm_core.contracts.drafting import Drafter
from ollm_core.contracts.kv import CacheKind, KVStore
from ollm_core.contracts.progress import Progress, Stats
from ollm_core.engine.engine import Engine
from ollm_core.errors import UnsupportedError
from ollm_core.files.paths import absolute
from ollm_core.generate.cache import SequenceCache
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.budgets import layer_limits
from ollm_core.model.skeleton import Skeleton
from ollm_core.values import Count, PathLike
from ollm_core.weights.streamer import TieredStreamer

OpenStore = Callable[[str, "Path | None", int, int], tuple[str, KVStore]]
"""(tier or "auto", directory, tokens to expect, at least) -> (tier, store)."""


class OpenedModel(Closing):
    """The part of a streamed model that transformers does not know."""

    config: PreTrainedConfig
    engine: Engine
    weights: TieredStreamer
    accounts: Accounts
    weight_bytes: int

    def _own(
        self,
        weights: TieredStreamer,
        engine: Engine,
        accounts: Accounts,
        open_store: OpenStore,
        kinds: Sequence[CacheKind],
        demand: Callable[[str], None],
        weight_bytes: int,
        skeleton: Skeleton,
    ) -> None:
        """To be called once. What is owned is closed with the model, or when it is dropped."""
        self.engine = engine
        self.weights = weights
        self.accounts = accounts
        self.weight_bytes = weight_bytes
        self._num_parameters = skeleton.num_parameters
        self._open_store = open_store
        self._kinds = kinds
        self._demand = demand
        self._belongings = Belongings(engine.close)
        # Also runs when nobody closed the model, and at exit.
        self._close = weakref.finalize(self, close_outside, self._belongings.close)
        self.draft_with(None)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.weights.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers its weights are, as transformers counts them: tied ones once. None can
        be trained. Raises UnsupportedError for `exclude_embeddings`.
        """
        if exclude_embeddings:
            raise UnsupportedError("num_parameters: embeddings cannot be left out")
        return 0 if only_trainable else self._num_parameters

    def new_cache(
        self,
        kv: str | None = None,
        kv_dir: PathLike | None = None,
        *,
        num_tokens: int = 0,
        at_least: int = 0,
    ) -> SequenceCache:
        """An empty cache for `past_key_values`, in a tier ("device", "host", "disk"; default: as
        loaded).

        `num_tokens` to expect, over all rows, helps to choose the tier when it is "auto". Raises
        DoesNotFitError if a disk has no room for `at_least` so many.
        """
        store = self._new_store(kv, kv_dir, num_tokens=num_tokens, at_least=at_least)
        cache = SequenceCache(store, self._kinds, self._demand)
        self._belongings.add(cache.finalizer)
        return cache

    def _new_store(
        self,
        kv: str | None = None,
        kv_dir: PathLike | None = None,
        *,
        num_tokens: int = 0,
        at_least: int = 0,
    ) -> KVStore:
        """See `new_cache`."""
        directory = None if kv_dir is None else absolute(kv_dir)
        tier, store = self._open_store(kv or "", directory, num_tokens, at_least)
        self.engine.counters.count_cache(tier)
        return store

    @property
    def stats(self) -> Stats:
        """What the model has done since it was opened."""
        engine = self.engine
        return engine.counters.stats(
            self.weights, self.accounts, engine.eviction, weight_bytes=self.weight_bytes
        )

    def keep_layers(self, device: Count | None = None, host: Count | None = None) -> None:
        """From the next pass on keep at most so many layers on the device and in host memory; None
        is as many as the budgets allow, which they never exceed. Raises InputError.
        """
        self.weights.limit_layers(layer_limits(self.device, device, host))

    def draft_with(self, drafter: Drafter | None, num_draft_tokens: int | None = None) -> None:
        """From the next text on draft with `drafter`, which is closed with the model if it can be,
        so many tokens at a time; None: as many as pay.
        """
        self._drafter, self._num_draft_tokens = drafter, num_draft_tokens
        self._belongings.drafter = drafter

    def on_progress(self, report: Callable[[Progress], None] | None) -> None:
        """Call `report` after every step of a weight pass; None stops it."""
        self.engine.progress.on_progress = report

    def close(self) -> None:
        """Stop reading, close all files, remove KV files that are not to be kept, and free all
        memory. May be called twice.
        """
        self._close()
