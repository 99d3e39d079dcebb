"""A text in the scheduler: tokens to be computed, and a sequence of the store that has some."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ollm_core.engine.batch import NewTokens
from ollm_core.serving.prefixes import as_tensor
from ollm_core.serving.request import (
    Counts,
    Event,
    Failed,
    Finished,
    FinishReason,
    Reading,
    Request,
)

STEP = 64
"""A part of a prompt ends at a multiple of it, as chunks of linear attention do."""


class LiveText(ABC):
    """Tokens that a sequence of the store is to have, in parts, and what comes of their logits."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = list(token_ids)
        self.sequence: int | None = None
        """In the store; None while it waits."""
        self.num_stored = 0
        """Tokens that the sequence has."""
        self.num_restarts = 0
        """How often its KV was lost."""
        self.ended: FinishReason | None = None
        self._prompt: Tensor | None = None

    @property
    @abstractmethod
    def rank(self) -> tuple[int, int]:
        """Priority, then order of arrival: the lowest comes first."""

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""

    @property
    @abstractmethod
    def texts(self) -> Sequence[RequestedText]:
        """Those that it is for, itself or others."""

    @property
    @abstractmethod
    def kept(self) -> bool:
        """Whether its KV is to be found again."""

    @abstractmethod
    def begin(self, num_cached: int) -> None:
        """It has a sequence, of which `num_cached` tokens were found."""

    @abstractmethod
    def take(self, logits: Tensor) -> list[Event]:
        """All that was pending is computed, the last of it with these `logits` [n, V]; -> what
        comes of it. `ended` is then set if there is nothing more to compute. Raises InputError.
        """

    @property
    def num_to_store(self) -> int:
        """Tokens that the sequence is to have before there is an answer, or the next token of
        one.
        """
        return len(self.token_ids)

    @property
    def num_to_find(self) -> int:
        """Of those, how many may be found already read: the logits of the last one are wanted."""
        return self.num_to_store - 1

    @property
    def num_pending(self) -> int:
        """Tokens to be computed."""
        return self.num_to_store - self.num_stored

    @property
    def reads(self) -> bool:
        """Whether it has not come to its first new token."""
        return True

    @property
    def prompt(self) -> Tensor:
        """What may be found already read, int32 [T]."""
        if self._prompt is None or len(self._prompt) != self.num_to_find:
            self._prompt = as_tensor(self.token_ids[: self.num_to_find])
        return self._prompt

    @property
    def expected_length(self) -> int:
        """Tokens that it is expected to have in the end."""
        return len(self.token_ids)

    def part(self, most: int | None) -> int:
        """How many of the pending tokens to compute next, at most `most`; 0 if these would be too
        few for a part of its own.
        """
        end = self.num_to_store
        if most is not None and self.num_pending > most:
            end = (self.num_stored + most) // STEP * STEP
        return max(end - self.num_stored, 0)

    def work(self, num_new: int) -> NewTokens:
        """Its part in a pass over the next `num_new` tokens."""
        assert self.sequence is not None
        begin, end = self.num_stored, self.num_stored + num_new
        ids = torch.tensor(self.token_ids[begin:end], dtype=torch.long, device="cpu")
        num_logits = self.num_logits(begin, end)
        return NewTokens(self.sequence, ids, begin, num_logits, kept=self.kept)

    def num_logits(self, begin: int, end: int) -> int:
        """Of the tokens from `begin` to `end`, of how many last ones logits are wanted."""
        return 1

    def note(self, begin: int, end: int, logits: Tensor) -> None:
        """The tokens from `begin` to `end` are computed, with these logits [n, V]."""
        self.num_stored = end

    def lose_sequence(self) -> None:
        """What it had is to be computed again."""
        self.sequence, self.num_stored = None, 0


class RequestedText(LiveText):
    """One of a request's answers."""

    def __init__(self, request: Request, index: int, order: int) -> None:
        super().__init__(request.token_ids)
        self.request = request
        self.index = index
        self.order = order
        self.dropped = False
        """It was cancelled."""
        self.num_new = 0
        self._num_cached: int | None = None
        self._arrived = time.perf_counter()
        self._begun: float | None = None
        self._first_token: float | None = None

    @property
    def rank(self) -> tuple[int, int]:
        return self.request.priority, self.order

    @property
    def cancelled(self) -> bool:
        return self.dropped

    @property
    def texts(self) -> Sequence[RequestedText]:
        return (self,)

    @property
    def kept(self) -> bool:
        return self.request.keep

    def begin(self, num_cached: int) -> None:
        self.read_by(time.perf_counter())
        if self._num_cached is None:
            self._num_cached = num_cached

    def read_by(self, begun: float) -> None:
        """A pass for it began at `begun`, its own or one of a prefix that it waits for."""
        self._begun = begun if self._begun is None else self._begun

    def has_token(self) -> None:
        """Its first result is there."""
        self._first_token = self._first_token or time.perf_counter()

    def reading(self, num_tokens: int) -> Event:
        """So much of the prompt is read."""
        return Reading(self.request.request_id, self.index, num_tokens)

    def finished(self, reason: FinishReason) -> Event:
        """Its last event."""
        return Finished(self.request.request_id, self.index, reason, self.rest(), self.counts())

    def failed(self, error: Exception) -> Event:
        """Its last event, if it fails."""
        return Failed(self.request.request_id, self.index, error)

    def rest(self) -> str:
        """What its text still ends with."""
        return ""

    def counts(self) -> Counts:
        """What it has taken so far."""
        now = time.perf_counter()
        begun = now if self._begun is None else self._begun
        first = now if self._first_token is None else self._first_token
        return Counts(
            num_prompt_tokens=len(self.request.token_ids),
            num_cached_tokens=self._num_cached or 0,
            num_new_tokens=self.num_new,
            queued_seconds=begun - self._arrived,
            prefill_seconds=first - begun,
            decode_seconds=now - first,
        )


class SharedPrefix(LiveText):
    """A beginning that several texts wait for."""

    def __init__(self, token_ids: Sequence[int], members: Sequence[RequestedText]) -> None:
        super().__init__(token_ids)
        self.members = list(members)
        self._begun = time.perf_counter()

    @property
    def rank(self) -> tuple[int, int]:
        return min(one.rank for one in self.members)

    @property
    def cancelled(self) -> bool:
        return all(one.dropped for one in self.members)

    @property
    def texts(self) -> Sequence[RequestedText]:
        return [one for one in self.members if not one.dropped]

    @property
    def kept(self) -> bool:
        return True

    @property
    def num_to_find(self) -> int:
        return self.num_to_store

    def begin(self, num_cached: int) -> None:
        for one in self.members:
            one.read_by(self._begun)

    def take(self, logits: Tensor) -> list[Event]:
        self.ended = "stop"
        return []

    def is_of(self, text: LiveText, longer_than: int) -> bool:
        """Whether `text` begins with it, and it has more than so many tokens."""
        length = len(self.token_ids)
        fits = longer_than < length <= text.num_to_find
        return fits and text.token_ids[:length] == self.token_ids
