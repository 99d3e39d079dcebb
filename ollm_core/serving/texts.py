"""The three kinds of texts that can be asked for: an answer, a score, and a choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ollm_core.engine.batch import NewTokens
from ollm_core.serving.answer import Answer
from ollm_core.serving.live import RequestedText
from ollm_core.serving.model import ServedModel
from ollm_core.serving.request import (
    Choices,
    Event,
    NewToken,
    Request,
    SamplingParams,
    Score,
    Scored,
)
from ollm_core.serving.sampler import Sampler, most_likely

MAX_LOGITS = 256
"""Of one text in a pass, where the log-probabilities of many tokens are wanted."""
_EXPECTED = 512
"""New tokens that an answer is expected to have at most, where it may have more."""


def open_texts(request: Request, model: ServedModel, order: int) -> list[RequestedText]:
    """What is to be computed for a request. Raises InputError."""
    wanted = request.wanted
    if isinstance(wanted, SamplingParams):
        return [
            GeneratedText(request, index, order + index, wanted, model) for index in range(wanted.n)
        ]
    if isinstance(wanted, Score):
        return [ScoredText(request, order, wanted)]
    return [ChoiceText(request, order, wanted)]


class GeneratedText(RequestedText):
    """An answer, token by token."""

    def __init__(
        self,
        request: Request,
        index: int,
        order: int,
        sampling: SamplingParams,
        model: ServedModel,
    ) -> None:
        super().__init__(request, index, order)
        self._sampling = sampling
        self._max_length = model.max_positions
        ends = model.end_ids
        self._sampler = Sampler(
            sampling, model.generation, len(request.token_ids), ends, model.device, index
        )
        stops = dict.fromkeys(() if sampling.ignore_eos else model.stop_texts, True)
        stops |= dict.fromkeys(sampling.stops, sampling.include_stop_str_in_output)
        self._answer = Answer(model.tokenizer, stops, sampling.shown_token_ids)
        self._ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends)}
        self.draft: list[int] = []
        """Guesses of what comes after all of its tokens, which the next pass checks."""
        self._told: ToldTokens | None = None
        """Of its prompt, until they are told; one of several answers tells them."""
        if sampling.prompt_logprobs is not None and index == 0:
            self._told = ToldTokens(0, sampling.prompt_logprobs)

    @property
    def samples(self) -> bool:
        """Whether chance has a part in it."""
        return self._sampling.temperature > 0 or self._sampling.choose is not None

    @property
    def longest(self) -> int:
        """Tokens that it has in the end at most."""
        length = len(self.request.token_ids) + self._sampling.max_tokens
        return length if self._max_length is None else min(length, self._max_length + 1)

    @property
    def reads(self) -> bool:
        return self.num_new == 0 or self.num_pending > 1

    @property
    def expected_length(self) -> int:
        more = min(self._sampling.max_tokens - self.num_new, _EXPECTED)
        return len(self.token_ids) + more

    @property
    def num_to_find(self) -> int:
        return super().num_to_find if self._told is None else 0

    def part(self, most: int | None) -> int:
        return super().part(most if self._told is None else self._told.most(self.num_stored, most))

    def num_logits(self, begin: int, end: int) -> int:
        return 1 if self._told is None else self._told.num_logits(begin, end)

    def note(self, begin: int, end: int, logits: Tensor) -> None:
        super().note(begin, end, logits)
        if self._told is not None:
            self._told.note(self.token_ids, begin, end, logits)

    def guess(self, token_ids: Sequence[int]) -> None:
        """Let the next pass check a draft, up to what would end the text."""
        ends = (i for i, token_id in enumerate(token_ids) if token_id in self._ends)
        self.draft = list(token_ids[: next(ends, len(token_ids))])

    def work(self, num_new: int) -> NewTokens:
        work = super().work(num_new)
        if not self.draft:
            return work
        ids = torch.cat([work.token_ids, torch.tensor(self.draft, dtype=torch.long, device="cpu")])
        return replace(
            work, token_ids=ids, num_logits=len(self.draft) + 1, num_drafted=len(ids) - 1
        )

    def lose_sequence(self) -> None:
        super().lose_sequence()
        self.draft = []
        if self._told is not None:
            self._told.forget()

    def take(self, logits: Tensor) -> list[Event]:
        """Of a draft what the model says, too, is taken: the text is the same without."""
        events = []
        if self._told is not None:
            events.append(self._told.event(self.request.request_id))
            self._told, logits = None, logits[-1:]
        for row, guess in zip(logits, [*self.draft, None], strict=True):
            events.append(self._next(row))
            if self.ended or self.token_ids[-1] != guess:
                break
            self.num_stored += 1
        self.draft = []
        return events

    def _next(self, logits: Tensor) -> Event:
        """One more token, after all that there are, by `logits` [V]."""
        token_id, logprobs = self._sampler.choose(self.token_ids, logits)
        self.token_ids.append(token_id)
        self.num_new += 1
        self.has_token()
        text = self._answer.add(token_id)
        stops = token_id in self._ends or self._answer.stopped_by is not None
        # A token is computed at its own position: the last one needs none.
        is_full = self._max_length is not None and len(self.token_ids) > self._max_length
        if stops and self.num_new >= self._sampling.min_tokens:
            self.ended = "stop"
        elif self.num_new >= self._sampling.max_tokens or is_full:
            self.ended = "length"
        return NewToken(self.request.request_id, self.index, token_id, text, logprobs)

    def rest(self) -> str:
        return self._answer.finish()


class ScoredText(RequestedText):
    """The log-probabilities of the last tokens of a text. The very last is only asked about."""

    def __init__(self, request: Request, order: int, score: Score) -> None:
        super().__init__(request, 0, order)
        self._told = ToldTokens(len(self.token_ids) - score.num_tokens - 1, score.top)

    @property
    def num_to_store(self) -> int:
        return len(self.token_ids) - 1

    @property
    def num_to_find(self) -> int:
        return self._told.first

    def part(self, most: int | None) -> int:
        return super().part(self._told.most(self.num_stored, most))

    def num_logits(self, begin: int, end: int) -> int:
        return self._told.num_logits(begin, end)

    def note(self, begin: int, end: int, logits: Tensor) -> None:
        super().note(begin, end, logits)
        self._told.note(self.token_ids, begin, end, logits)

    def lose_sequence(self) -> None:
        super().lose_sequence()
        self._told.forget()

    def take(self, logits: Tensor) -> list[Event]:
        self.has_token()
        self.ended = "stop"
        return [self._told.event(self.request.request_id)]


class ToldTokens:
    """The log-probabilities of a text's tokens after number `first`, as they are computed."""

    def __init__(self, first: int, num_top: int) -> None:
        self.first = first
        """The first token whose logits are wanted."""
        self._num_top = num_top
        self._logprobs: list[float] = []
        self._greedy: list[bool] = []
        self._top: list[tuple[tuple[int, float], ...]] = []

    def most(self, num_stored: int, most: int | None) -> int:
        """Tokens of the next part: logits of many take much memory."""
        limit = max(self.first - num_stored, 0) + MAX_LOGITS
        return limit if most is None else min(most, limit)

    def num_logits(self, begin: int, end: int) -> int:
        """Of the tokens from `begin` to `end`, of how many last ones logits are wanted."""
        return max(end - max(begin, self.first), 1)

    def note(self, token_ids: Sequence[int], begin: int, end: int, logits: Tensor) -> None:
        """The tokens from `begin` to `end` are computed, with these logits [n, V]."""
        targets = token_ids[max(begin, self.first) + 1 : end + 1]  # none before the first
        for target, row in zip(targets, logits, strict=False):
            logprobs, greedy = _told(row, [target])
            self._logprobs += logprobs
            self._greedy += greedy
            if self._num_top:
                self._top.append(most_likely(torch.log_softmax(row.float(), -1), self._num_top))

    def forget(self) -> None:
        """All is computed again."""
        self._logprobs, self._greedy, self._top = [], [], []

    def event(self, request_id: str) -> Event:
        """When all are."""
        found = tuple(self._logprobs), tuple(self._greedy), tuple(self._top)
        return Scored(request_id, 0, *found)


class ChoiceText(RequestedText):
    """How likely each of some tokens is to come next."""

    def __init__(self, request: Request, order: int, choices: Choices) -> None:
        super().__init__(request, 0, order)
        self._choices = choices.token_ids

    def take(self, logits: Tensor) -> list[Event]:
        self.has_token()
        self.ended = "stop"
        logprobs, greedy = _told(logits[-1], self._choices)
        return [Scored(self.request.request_id, 0, tuple(logprobs), tuple(greedy))]


def _told(logits: Tensor, token_ids: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Of each of the tokens its log-probability by `logits` [V], and whether it is the most likely
    of all.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = int(logprobs.argmax())
    ids = torch.tensor(token_ids, dtype=torch.long, device=logits.device)
    return logprobs[ids].tolist(), [token_id == best for token_id in token_ids]
