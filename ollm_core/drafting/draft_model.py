"""A small model in memory as a draft source: it guesses what it would say next."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ollm_core.contracts.closing import Belongings, Closing, close_outside
from ollm_core.contracts.drafting import FollowsText
from ollm_core.contracts.kv import KVStore
from ollm_core.drafting.draft_memory import DraftAccounts, DraftMemory
from ollm_core.drafting.text_drafts import NUM_DRAFT_TOKENS
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.engine import Engine
from ollm_core.errors import InputError, KVStoreError, NotFiniteError

_OTHER_VOCABULARY = (
    "a draft model has the vocabulary of the model: take a smaller one of the same family"
)
_BEHIND = 2 * NUM_DRAFT_TOKENS
"""Tokens not read yet, from which reading them is no part of a draft."""


class ModelDrafter(Closing, FollowsText):
    """Drafts greedily with a model of its own, on one KV sequence that follows the text: what the
    text still has of it stays, and only the rest is read.

    A family with recurrent states, which go back over one pass only, drafts on a copy.
    """

    def __init__(
        self, engine: Engine, store: KVStore, room: DraftMemory, part: DraftAccounts
    ) -> None:
        """Owns `engine` and `store`, whose accounts are `part`'s, and `part`. Reads the weights at
        once.
        """
        self.engine = engine
        self.part = part
        self._store = store
        self._room = room
        # Also runs when nobody closed the drafter, and at exit.
        closers = Belongings(store.close, engine.close)
        self._close = weakref.finalize(self, close_outside, closers.close)
        self._sequence: int | None = None
        self._read = torch.zeros(0, dtype=torch.long)
        """The tokens that the sequence has, [S]."""
        self._most = 1
        self._lock = threading.Lock()
        self._feed(torch.zeros(1, dtype=torch.long))
        self._forget()

    def begin(self, num_tokens: int) -> None:
        """See FollowsText. A text that is longer than its positions is drafted for as far as these
        go.
        """
        with self._lock:
            most = max(min(num_tokens, self._room.max_positions), 1)
            if self._sequence is not None and len(self._read) > most:
                self._go_back(most if num_tokens else 0)
            if num_tokens == 0:
                self._forget()
            if most != self._most:
                self._most = min(most, self._most)  # until there is room for more
                self.part.resize(self._room.needed(most))
                self._most = most

    def catch_up(self, token_ids: Tensor) -> None:
        """See FollowsText."""
        with self._lock:
            if len(token_ids) <= self._most and len(token_ids) - self._shared(token_ids) > _BEHIND:
                self._read_up_to(token_ids[:-1])

    def __call__(self, token_ids: Tensor, num_tokens: int) -> Tensor:
        """See Drafter."""
        with self._lock:
            num_tokens = min(num_tokens, self._most - len(token_ids))
            if num_tokens < 1 or len(token_ids) == 0 or not self._close.alive:
                return token_ids[:0]
            guesses = [self._read_up_to(token_ids)]
            store, sequence = self._store, self._sequence
            assert sequence is not None, "it has just read a text"
            copy = store.fork(sequence) if self._room.forks and num_tokens > 1 else sequence
            try:
                while len(guesses) < num_tokens:
                    start = len(token_ids) + len(guesses) - 1
                    guesses.append(self._step(copy, guesses[-1], start))
            except BaseException:
                self._forget()  # it has more than is noted
                raise
            finally:
                if copy != sequence:
                    store.release(copy)
            found = torch.cat(guesses)
            if copy == sequence:
                self._read = torch.cat([token_ids, found[:-1]])
            return found

    def close(self) -> None:
        """Free the model and give its part of the accounts back."""
        with self._lock:
            self._forget()
            self._close()
            self.part.close()

    def _shared(self, token_ids: Tensor) -> int:
        """How many of `token_ids` the sequence begins with."""
        length = min(len(token_ids), len(self._read))
        differ = (token_ids[:length] != self._read[:length]).nonzero()
        return int(differ[0]) if len(differ) else length

    def _read_up_to(self, token_ids: Tensor) -> Tensor:
        """Let the sequence have just `token_ids`; -> the next one, [1]."""
        self._go_back(min(self._shared(token_ids), len(token_ids) - 1))
        return self._feed(token_ids[len(self._read) :])

    def _go_back(self, num_tokens: int) -> None:
        """Keep `num_tokens`, or nothing where the family cannot go back so far."""
        if num_tokens == len(self._read) or self._sequence is None:
            return
        try:
            self._store.truncate(self._sequence, num_tokens)
            self._read = self._read[:num_tokens]
        except KVStoreError:
            self._forget()

    def _forget(self) -> None:
        if self._sequence is not None:
            self._store.release(self._sequence)
        self._sequence, self._read = None, self._read[:0]

    def _feed(self, token_ids: Tensor) -> Tensor:
        """Read `token_ids` [T] after what the sequence has; -> the next token, [1]."""
        if not self._close.alive:
            raise InputError("the draft model is closed")
        if self._sequence is None:
            self._sequence = self._store.new_sequence()
        found = token_ids[:0]
        for piece in token_ids.split(self._room.piece or len(token_ids)):
            found = self._step(self._sequence, piece, len(self._read))
            self._read = torch.cat([self._read, piece])
        return found

    def _step(self, sequence: int, token_ids: Tensor, start: int) -> Tensor:
        """One pass over `token_ids` [T] of `sequence`; -> the likeliest next token, [1]."""
        work = NewTokens(sequence, token_ids, start)
        try:
            (logits,) = self.engine.run(self._store, [work])
        except NotFiniteError as error:
            raise NotFiniteError(f"the draft model: {error.message}", hint=error.hint) from error
        return logits[-1:].argmax(dim=-1).cpu()


def check_vocabulary(
    draft_size: int, draft_tokenizer: Any, main_size: int, main_tokenizer: Any
) -> None:
    """Raise InputError unless a draft model has the vocabulary of the main model: as many tokens,
    and the same ids for the same tokens as far as both have a tokenizer.
    """
    if draft_size != main_size:
        raise InputError(
            f"the draft model has a vocabulary of {draft_size} tokens, the model one of "
            f"{main_size}",
            hint=_OTHER_VOCABULARY,
        )
    if draft_tokenizer is None or main_tokenizer is None:
        return
    theirs: dict[str, int] = draft_tokenizer.get_vocab()
    ours: dict[str, int] = main_tokenizer.get_vocab()
    if ours != theirs:
        token = min(name for name, _ in ours.items() ^ theirs.items())
        ids = [str(vocabulary.get(token, "none")) for vocabulary in (theirs, ours)]
        raise InputError(
            f"the draft model has another tokenizer: the id of {token!a:.40} is {ids[0]} in its "
            f"vocabulary, and {ids[1]} in the model's",
            hint=_OTHER_VOCABULARY,
        )
