"""The transformers face of the engine: `generate` is transformers' own, each of its steps is one
weight pass.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ollm_core.contracts.closing import Belongings, Closing, close_outside
from ollm_core.contracts.drafting import Drafter
from ollm_core.contracts.kv import CacheKind, KVStore
from ollm_core.contracts.progress import Progress, Stats
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.engine import Engine
from ollm_core.engine.stats import gather_stats
from ollm_core.errors import DamagedKVError, InputError, UnsupportedError
from ollm_core.files.paths import absolute
from ollm_core.generate.arguments import refuse_others
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.hooks import GenerationHooks
from ollm_core.generate.loss import check_labels, loss_bytes
from ollm_core.generate.padding import PaddedBatch, padded_batch
from ollm_core.generate.surface import FixedModel, only_what_works
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.budgets import layer_limits
from ollm_core.memory.kinds import MemoryKind
from ollm_core.model.skeleton import Skeleton
from ollm_core.options import Count, PathLike
from ollm_core.weights.streamer import TieredWeights

OpenStore = Callable[[str, "Path | None", int, int], tuple[str, KVStore]]
"""(tier or "auto", directory, tokens to expect, at least) -> (tier, store)."""


@only_what_works
class StreamedModel(  # type: ignore[misc]  # torch overloads `to`
    FixedModel, GenerationHooks, PreTrainedModel, GenerationMixin, Closing
):
    """A causal language model whose weights are streamed. Open it with `ollm.load`, close it after
    use.

    `generate`, `forward` and the caches work as in transformers. There are no parameters to look
    at: what `ollm_core.generate.surface` does not list raises UnsupportedError.
    """

    _supports_sdpa = True
    _is_stateful = False

    def __init__(
        self,
        skeleton: Skeleton,
        weights: TieredWeights,
        engine: Engine,
        accounts: Accounts,
        open_store: OpenStore,
        kinds: Sequence[CacheKind],
        *,
        weight_bytes: int,
        generation_config: GenerationConfig | None = None,
        tokenizer: Any = None,
        demand: Callable[[str], None],
    ) -> None:
        """`demand` raises UnsupportedError for a capability that the adapter does not have."""
        config = copy.deepcopy(skeleton.config)
        config._attn_implementation = "eager"
        super().__init__(config)
        if generation_config is not None:
            self.generation_config = generation_config
        # Checkpoints saved while training say False, and every token would be a whole prefill.
        self.generation_config.use_cache = True
        self.tokenizer = tokenizer
        self.engine = engine
        self.weights = weights
        self.accounts = accounts
        self._open_store = open_store
        self._kinds = kinds
        self._demand = demand
        self._belongings = Belongings(weights.close, engine.close)
        # Also runs when nobody closed the model, and at exit.
        self._close = weakref.finalize(self, close_outside, self._belongings.close)
        self.draft_with(None)
        self.training = False
        self.loss_type = "ForCausalLM"
        self.weight_bytes = weight_bytes
        self._kv_tier = ""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: SequenceCache | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One weight pass over a batch: `input_ids` [B, T] after what the cache has -> logits [B,
        n, V].

        - `attention_mask` [B, past + T] marks padding with 0, anywhere; such positions are left out
          of the pass and their logits are 0. Without it, nothing new is padding.
        - `logits_to_keep`: a number n of last positions, or which, [n]. Default: all T.
        - `labels`, `shift_labels` [B, T], `num_items_in_batch`: for transformers' own loss.
        - `use_cache` makes a cache and returns it where none is given; by default it does not.
        - `return_dict` False returns a tuple; the default is the config's.

        Of transformers' other arguments, those that say what happens anyway are taken, as
        `ollm_core.generate.arguments` lists them. Raises InputError for any other, UnsupportedError
        for one that transformers knows, and what `Engine.run` does.
        """
        if not self._close.alive:
            raise InputError("the model is closed", hint="open it again with ollm.load")
        if input_ids is None:
            raise UnsupportedError("a streamed model takes input_ids, not inputs_embeds or nothing")
        if past_key_values is not None and not isinstance(past_key_values, SequenceCache):
            raise InputError(
                f"past_key_values is a {type(past_key_values).__name__}",
                hint="leave it out, or make one with model.new_cache()",
            )
        past = [] if past_key_values is None else past_key_values.kept
        batch = padded_batch(input_ids, attention_mask, past, logits_to_keep)
        refuse_others(others, batch)
        self._check(batch)
        options = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        with ExitStack() as stack:
            if labels is not None:
                stack.enter_context(self._room_for_loss(labels, shift_labels, batch))
            elif any(value is not None for value in options.values()):
                raise InputError("shift_labels and num_items_in_batch need labels")
            cache = past_key_values
            if cache is None:
                num_real = int(batch.kept.sum())
                cache = self.new_cache(num_tokens=batch.ids.numel(), at_least=num_real)
                if not use_cache:
                    stack.callback(cache.close)
            logits = self._pass(batch, cache)
            loss = None
            if labels is not None:
                size = self.config.vocab_size
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **options)
        keep = cache if past_key_values is not None or use_cache else None
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=keep)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return found if as_dict else found.to_tuple()

    @contextmanager
    def _room_for_loss(
        self, labels: Tensor, shift_labels: Tensor | None, batch: PaddedBatch
    ) -> Iterator[None]:
        """Check labels, and hold the memory that their loss takes."""
        check_labels(labels, shift_labels, batch, self.config.vocab_size)
        if getattr(self.config, "output_router_logits", False):
            raise UnsupportedError(
                "labels: this model's loss counts how its routers choose, too",
                hint="set model.config.output_router_logits = False for the loss of the text alone",
            )
        needed = loss_bytes(batch, self.config.vocab_size, self.dtype)
        self.engine.set_aside(MemoryKind.LOSS, needed)
        try:
            with torch.no_grad():
                yield
        finally:
            self.accounts.device.release(MemoryKind.LOSS, needed.device)

    def _pass(self, batch: PaddedBatch, cache: SequenceCache) -> Tensor:
        """The logits of a batch; the cache then has its tokens."""
        if len(batch.ids) > 1:
            self._demand("batch")
        cache.begin(len(batch.ids))
        tokens = batch.tokens
        run = self._continue if cache.get_seq_length() else self._start
        rows = run(cache, tokens, batch.num_logits)
        cache.extend(batch.kept, tokens)
        return batch.spread(rows)

    def _start(
        self, cache: SequenceCache, tokens: Sequence[Tensor], num_logits: Sequence[int]
    ) -> list[Tensor]:
        """Run rows that are empty: of each, what the store has not kept of an earlier run."""
        num_cached: int | None = None
        while True:
            try:
                cache.restore([ids[:-n] for ids, n in zip(tokens, num_logits, strict=True)])
                starts = [cache.num_tokens(row) for row in range(len(tokens))]
                rest = [ids[start:] for ids, start in zip(tokens, starts, strict=True)]
                found = self._continue(cache, rest, num_logits)
            except DamagedKVError:
                cache.clear()
                if sum(starts) == 0 or (num_cached is not None and sum(starts) >= num_cached):
                    raise
                num_cached = sum(starts)  # what is damaged is not found again
            except BaseException:
                cache.clear()
                raise
            else:
                self.engine.counters.cached_tokens += sum(starts)
                return found

    def _continue(
        self, cache: SequenceCache, tokens: Sequence[Tensor], num_logits: Sequence[int]
    ) -> list[Tensor]:
        """Run each row's tokens after those that it has."""
        work = []
        for row, (ids, n) in enumerate(zip(tokens, num_logits, strict=True)):
            num_drafted = n - 1 if cache.drafting else 0
            work.append(NewTokens(cache.rows[row], ids, cache.num_tokens(row), n, num_drafted))
        return self.engine.run(cache.store, work)

    def _check(self, batch: PaddedBatch) -> None:
        """Raise InputError for tokens that are none, and for too many."""
        lowest, highest = int(batch.ids.min()), int(batch.ids.max())
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InputError(
                f"token id {wrong} is not in the vocabulary of {self.config.vocab_size}",
                hint="the tokenizer is not this model's",
            )
        counts = batch.kept.sum(dim=1).tolist()
        self.check_length(max(map(sum, zip(batch.starts, counts, strict=True))))

    def check_length(self, length: int) -> None:
        """Raise InputError for more tokens than the model has positions."""
        limit = self.config.max_position_embeddings
        if length > limit:
            raise InputError(
                f"{length} tokens are past the model's {limit} positions",
                hint="shorten the prompt or ask for fewer new tokens",
            )

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
        directory = None if kv_dir is None else absolute(kv_dir)
        self._kv_tier, store = self._open_store(kv or "", directory, num_tokens, at_least)
        cache = SequenceCache(store, self._kinds, self._demand)
        caches = self._belongings.caches
        caches[:] = [*(finalizer for finalizer in caches if finalizer.alive), cache.finalizer]
        return cache

    @property
    def stats(self) -> Stats:
        """What the model has done since it was opened."""
        parts = self.engine, self.weights, self.accounts
        return gather_stats(*parts, weight_bytes=self.weight_bytes, kv_tier=self._kv_tier)

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
        self.engine.on_progress = report

    def close(self) -> None:
        """Stop reading, close all files, remove KV files that are not to be kept, and free all
        memory. May be called twice.
        """
        self._close()

    # What GenerationMixin asks of a model that has no parameters to look at.

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def get_experts_implementation(self) -> dict[str, str | None]:
        return {}
