"""Methods that transformers' `generate` calls on a model: caches, inputs of each step, drafts."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from ollm_core.device.openmp import openmp_threads_end
from ollm_core.drafting.candidates import DraftCandidates
from ollm_core.drafting.controller import draft_length
from ollm_core.drafting.text_drafts import NUM_DRAFT_TOKENS, TextDrafts, begin_text
from ollm_core.errors import InputError, UnsupportedError, one_line
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.limits import check_length
from ollm_core.generate.opened import OpenedModel
from ollm_core.generate.padding import refuse_padded_end

_NOT_HERE = {
    "cache_implementation": "choose with kv='device', 'host' or 'disk' when loading",
    "prefill_chunk_size": "chunk_size, when loading, cuts a prompt within one reading of weights",
    "assistant_early_exit": "draft='lookup' or 'model', when loading, drafts",
    "use_mtp": "draft='lookup' or 'model', when loading, drafts",
}
"""Options of generation for models whose layers and caches are transformers' own, and what there is
instead.
"""


class GenerationHooks(OpenedModel):
    """The part of a streamed model that `generate` calls. To stand before GenerationMixin."""

    tokenizer: Any

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """See GenerationMixin: the first that is asked with the prompt. What cannot be done is
        refused here.
        """
        for name, instead in _NOT_HERE.items():
            if getattr(generation_config, name, None):
                raise UnsupportedError(f"generate: a streamed model takes no {name}", hint=instead)
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            refuse_padded_end(mask != 0)
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self._demand("drafts")
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        one_row = copies * batch_size == 1 and generation_config.use_cache is not False
        begin_text(self._drafter, max_cache_length + 1 if one_row else 0)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            num_padding = [0] * batch_size if mask is None else (mask == 0).sum(dim=1).tolist()
            lengths = [max_cache_length - number for number in num_padding]
            if (num_new := generation_config.max_new_tokens) is not None:
                check_length(max(lengths) + 1 - num_new, self.config)  # no memory would do
            # Copies of a prompt share its blocks; how many rows come in is not told.
            at_least = sum(lengths) if copies == 1 else max(lengths)
            num_tokens = copies * batch_size * max_cache_length
            cache = self.new_cache(num_tokens=num_tokens, at_least=at_least)
            model_kwargs["past_key_values"] = cache
            if copies == 1:
                self.engine.demand_room(cache.store, lengths)
        return True

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: Any = None,
    ) -> StoppingCriteriaList:
        """See GenerationMixin. Stop strings are found by the checkpoint's own tokenizer, unless
        `tokenizer` is another.
        """
        mixin: Any = super()
        if tokenizer is None:
            tokenizer = self.tokenizer
        try:
            criteria: StoppingCriteriaList = mixin._get_stopping_criteria(
                generation_config, stopping_criteria, tokenizer=tokenizer
            )
        except (ValueError, TypeError) as error:
            if generation_config.stop_strings is None:
                raise
            raise InputError(
                f"stop strings {generation_config.stop_strings!a:.60}, given or those of "
                f"generation_config.json, cannot be looked for: {one_line(error)}",
                hint="transformers needs to take the tokenizer's vocabulary apart for them; "
                "stop_strings=None goes without",
            ) from error
        return criteria

    @openmp_threads_end()
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
        drafts = TextDrafts(
            self._drafter,
            draft_length(NUM_DRAFT_TOKENS, self._num_draft_tokens, sampling=sampling),
            self.engine.counters,
            lambda number: self.engine.fits(cache.store, [cache.drafted(number)]),
            vocab_size=self.config.vocab_size,
        )
        positions = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        candidates = DraftCandidates(drafts, stopping_criteria, max_positions=positions)
        # The assistant model is only handed on, to _get_candidate_generator.
        decode: Any = self._assisted_decoding
        return decode(*arguments, streamer, assistant_model=candidates, **options)

    @functools.wraps(GenerationMixin._assisted_decoding)  # generate reads its parameters
    def _assisted_decoding(self, *arguments: Any, **options: Any) -> Any:
        """See GenerationMixin. When the text has ended, what the cache's user brings next is no
        draft: a recurrent layer need not keep a state for each of its tokens.
        """
        mixin: Any = super()
        try:
            return mixin._assisted_decoding(*arguments, **options)
        finally:
            cache = options.get("past_key_values")
            if isinstance(cache, SequenceCache):
                cache.drafting = False

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
        has in a second turn, and which hands to `forward` what is for `generate` itself.
        """
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
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
