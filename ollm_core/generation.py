"""The transformers face of the engine: `generate` is transformers' own, each of its steps is one
weight pass.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ollm_core.admission import Accounts
from ollm_core.budgets import layer_limits
from ollm_core.cache import SequenceCache
from ollm_core.chunks import NewTokens
from ollm_core.closing import Belongings, close_outside
from ollm_core.draft_gate import draft_length
from ollm_core.drafts import NUM_DRAFT_TOKENS, DraftCandidates, begin_text
from ollm_core.engine import Engine
from ollm_core.errors import DamagedKVError, InputError, UnsupportedError
from ollm_core.interfaces import Closing, Drafter, KVStore
from ollm_core.options import Count, PathLike
from ollm_core.run_stats import gather_stats
from ollm_core.skeleton import Skeleton
from ollm_core.types import CacheKind, Progress, Stats
from ollm_core.user_files import absolute
from ollm_core.weights.tiered import TieredWeights

OpenStore = Callable[[str, "Path | None", int, int], tuple[str, KVStore]]
"""(tier or "auto", directory, tokens to expect, at least) -> (tier, store)."""


class StreamedModel(PreTrainedModel, GenerationMixin, Closing):
    """A causal language model whose weights are streamed. Open it with `ollm.load`, close it after
    use.

    `generate`, `forward` and the caches work as in transformers; there are no parameters to look
    at.
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
        self.weight_bytes = weight_bytes
        self._kv_tier = ""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SequenceCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """One weight pass over a batch: `input_ids` [B, T] after what the cache has -> logits [B,
        n, V].

        `attention_mask` [B, past + T] marks padding with 0, anywhere; such positions are left out
        of the pass and their logits are 0. n is T, or `logits_to_keep` last positions.
        """
        if not self._close.alive:
            raise InputError("the model is closed", hint="open it again with ollm.load")
        if input_ids is None or inputs_embeds is not None:
            raise UnsupportedError("a streamed model takes input_ids, not inputs_embeds")
        if output_attentions or output_hidden_states:
            raise UnsupportedError("a streamed model returns neither attentions nor hidden states")
        if past_key_values is not None and not isinstance(past_key_values, SequenceCache):
            raise InputError(
                f"past_key_values is a {type(past_key_values).__name__}",
                hint="leave it out, or make one with model.new_cache()",
            )
        cache = past_key_values
        if cache is None:
            num_tokens = input_ids.numel()
            mask = input_ids.new_ones(0) if attention_mask is None else attention_mask
            padding = int((mask[..., -input_ids.shape[1] :] == 0).sum())
            cache = self.new_cache(num_tokens=num_tokens, at_least=num_tokens - padding)
        try:
            logits = self._pass(input_ids, attention_mask, cache, logits_to_keep)
        finally:
            if past_key_values is None and not use_cache:
                cache.close()
        keep = cache if past_key_values is not None or use_cache else None
        return CausalLMOutputWithPast(logits=logits, past_key_values=keep)

    def _pass(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: SequenceCache,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        num_rows, num_new = input_ids.shape
        if num_rows > 1:
            self._demand("batch")
        ids = input_ids.cpu()
        kept = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            kept = attention_mask[:, -num_new:].cpu().bool()
        num_last = num_new
        if isinstance(logits_to_keep, int) and logits_to_keep:
            num_last = min(logits_to_keep, num_new)
        self._check(ids, kept, cache)
        cache.begin(num_rows)
        tokens = [ids[row][kept[row]] for row in range(num_rows)]
        num_logits = [max(int(kept[row, -num_last:].sum()), 1) for row in range(num_rows)]
        run = self._continue if cache.get_seq_length() else self._start
        found = run(cache, tokens, num_logits)
        cache.extend(kept, tokens)
        if bool(kept[:, -num_last:].all()):
            logits = found[0][None] if num_rows == 1 else torch.stack(found)
        else:
            logits = found[0].new_zeros(num_rows, num_last, found[0].shape[-1])
            for row, values in enumerate(found):
                where = kept[row, -num_last:].to(values.device)
                logits[row, where] = values[: int(where.sum())]
        return logits if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]

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

    def _check(self, ids: Tensor, kept: Tensor, cache: SequenceCache) -> None:
        if ids.numel() == 0 or not bool(kept.any(dim=1).all()):
            raise InputError("the prompt is empty", hint="give at least one token per row")
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InputError(
                f"token id {wrong} is not in the vocabulary of {self.config.vocab_size}",
                hint="the tokenizer is not this model's",
            )
        past = max((cache.num_tokens(row) for row in range(len(cache.rows))), default=0)
        self._check_length(past + int(kept.sum(dim=1).max()))

    def _check_length(self, length: int) -> None:
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
        self.weights.held.layer_limits = layer_limits(self.device, device, host)

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

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        if generation_config.cache_implementation is not None:
            raise UnsupportedError(
                "cache_implementation is for transformers' caches",
                hint="choose with kv='device', 'host' or 'disk' when loading",
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self._demand("drafts")
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        one_row = copies * batch_size == 1 and generation_config.use_cache is not False
        begin_text(self._drafter, max_cache_length + 1 if one_row else 0)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            mask = model_kwargs.get("attention_mask")
            mask = torch.ones(batch_size, 0) if mask is None else mask
            lengths = (max_cache_length - (mask == 0).sum(dim=1)).tolist()
            if (num_new := generation_config.max_new_tokens) is not None:
                self._check_length(max(lengths) + 1 - num_new)  # no memory would do
            # Copies of a prompt share its blocks; how many rows come in is not told.
            at_least = sum(lengths) if copies == 1 else max(lengths)
            num_tokens = copies * batch_size * max_cache_length
            cache = self.new_cache(num_tokens=num_tokens, at_least=at_least)
            model_kwargs["past_key_values"] = cache
            if copies == 1:
                self.engine.demand_room(cache.store, lengths)
        return True

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> Any:
        """Greedy decoding and sampling. Where there is a draft source, transformers' assisted
        decoding, which knows one row only and needs a cache; anything else is decoded plainly.
        """
        mixin: Any = super()  # transformers types `self` for its own classes only
        arguments = input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus
        if self._drafter is None or input_ids.shape[0] > 1 or not options.get("use_cache"):
            return mixin._sample(*arguments, streamer, **options)
        cache: SequenceCache = options["past_key_values"]
        sampling = generation_config.do_sample
        candidates = DraftCandidates(
            self._drafter,
            draft_length(NUM_DRAFT_TOKENS, self._num_draft_tokens, sampling=sampling),
            self.engine.counters,
            stopping_criteria,
            self._count_accepted,
            lambda number: self.engine.fits(cache.store, [cache.drafted(number)]),
            max_positions=self.config.max_position_embeddings,
            vocab_size=self.config.vocab_size,
        )
        # The assistant model is only handed on, to _get_candidate_generator.
        return mixin._assisted_decoding(*arguments, streamer, assistant_model=candidates, **options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,  # by this name transformers knows that forward takes the rest
    ) -> dict[str, Any]:
        """See GenerationMixin, whose assisted decoding gives a cache the tokens that it already
        has in a second turn.
        """
        mixin: Any = super()
        if next_sequence_length is None and past_key_values is not None:
            next_sequence_length = input_ids.shape[1] - past_key_values.get_seq_length()
        inputs: dict[str, Any] = mixin.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            past_key_values,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )
        return inputs

    def _get_candidate_generator(self, *arguments: Any, **options: Any) -> CandidateGenerator:
        candidates = options.get("assistant_model")
        if isinstance(candidates, DraftCandidates):
            return candidates
        mixin: Any = super()
        generator: CandidateGenerator = mixin._get_candidate_generator(*arguments, **options)
        return generator

    def _count_accepted(self, num_tokens: int) -> None:
        """A pass has given `num_tokens` more than the one that it was counted for."""
        self.engine.counters.decode_tokens += num_tokens
        self.engine.counters.accepted_tokens += num_tokens
