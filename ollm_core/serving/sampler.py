"""Chooses the tokens of one answer: transformers' own logits processors, and a generator of the
answer's own, so that a seed repeats a text whatever runs beside it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ollm_core.errors import InputError, one_line
from ollm_core.serving.request import MAX_SEED, SamplingParams, TokenLogprobs

_GREEDY = 0.0


class Sampler:
    """Chooses token by token, for one answer."""

    def __init__(
        self,
        sampling: SamplingParams,
        model: GenerationConfig,
        num_prompt_tokens: int,
        end_ids: Sequence[int],
        device: torch.device,
        index: int = 0,
    ) -> None:
        """`model` is the checkpoint's generation config: what it must not or should not say.
        `index` tells the answers to one prompt apart.
        """
        self._sampling = sampling
        self._processors = _processors(sampling, model, num_prompt_tokens, end_ids, device)
        self._generator: torch.Generator | None = None
        if sampling.temperature != _GREEDY and sampling.choose is None:
            seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed + index
            self._generator = torch.Generator(device).manual_seed(seed)

    def choose(self, token_ids: Sequence[int], logits: Tensor) -> tuple[int, TokenLogprobs | None]:
        """The next token after `token_ids`, of `logits` [V] as the model gave them. Raises
        InputError where a function of the user's fails or gives no token.
        """
        scores = logits.to(torch.float32, copy=True)
        try:
            if self._processors:
                ids: Any = torch.tensor([token_ids], dtype=torch.long, device=logits.device)
                scores = self._processors(ids, scores[None])[0]
            token_id = self._choose(token_ids, scores)
        except Exception as error:
            if self._sampling.choose is None and not self._sampling.logits_processors:
                raise
            raise InputError(
                f"a sampling function failed: {one_line(error)}",
                hint="it is called with token ids and logits, as SamplingParams says",
            ) from error
        if not 0 <= token_id < len(scores):
            raise InputError(f"choose gave token id {token_id}, the vocabulary has {len(scores)}")
        return token_id, self._logprobs(logits, token_id)

    def _choose(self, token_ids: Sequence[int], scores: Tensor) -> int:
        if self._sampling.choose is not None:
            return int(self._sampling.choose(token_ids, scores))
        if self._generator is None:
            return int(scores.argmax())
        likely = torch.softmax(scores, dim=-1)
        if not math.isfinite(float(likely.sum())):  # torch would end the whole pass
            raise InputError(
                f"temperature {self._sampling.temperature:g}: the scores of tokens are no numbers "
                "after it",
                hint="raise it, or use 0 for the most likely token",
            )
        return int(torch.multinomial(likely, 1, generator=self._generator))

    def _logprobs(self, logits: Tensor, token_id: int) -> TokenLogprobs | None:
        number = self._sampling.logprobs
        if number is None:
            return None
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        return TokenLogprobs(float(logprobs[token_id]), most_likely(logprobs, number))


def most_likely(logprobs: Tensor, number: int) -> tuple[tuple[int, float], ...]:
    """So many of the most likely tokens by their log-probabilities [V], the most likely first."""
    best = logprobs.topk(min(number, len(logprobs)))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _processors(
    sampling: SamplingParams,
    model: GenerationConfig,
    num_prompt_tokens: int,
    end_ids: Sequence[int],
    device: torch.device,
) -> LogitsProcessorList:
    """In the order of transformers' `generate`."""
    found: list[LogitsProcessor | object] = []
    penalty = sampling.repetition_penalty
    if penalty == 1.0:
        penalty = model.repetition_penalty or 1.0
    if penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(penalty))
    if model.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(model.no_repeat_ngram_size))
    ends = None if sampling.ignore_eos else torch.tensor(end_ids, device=device)
    if model.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor(model.bad_words_ids, ends))
    stops = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else end_ids)]
    if sampling.min_tokens and stops:
        found.append(
            MinNewTokensLengthLogitsProcessor(
                num_prompt_tokens, sampling.min_tokens, stops, device=str(device)
            )
        )
    if model.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(model.suppress_tokens, str(device)))
    if model.begin_suppress_tokens:
        found.append(
            SuppressTokensAtBeginLogitsProcessor(
                model.begin_suppress_tokens, num_prompt_tokens, str(device)
            )
        )
    found += sampling.logits_processors
    if sampling.temperature != _GREEDY and sampling.choose is None:
        if sampling.temperature != 1.0:
            found.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            found.append(TopKLogitsWarper(top_k=sampling.top_k))
        if sampling.top_p < 1.0:
            found.append(TopPLogitsWarper(top_p=float(sampling.top_p)))
        if sampling.min_p > 0.0:
            found.append(MinPLogitsWarper(min_p=float(sampling.min_p)))
    return LogitsProcessorList(found)
