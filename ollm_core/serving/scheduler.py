"""The scheduler: requests in, events out, one weight pass at a step.

It chooses who takes part in the next pass and with how many tokens. What a pass takes of memory the
engine knows; what comes of its logits, each text. Not thread-safe but for `cancel`: `session` gives
it a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import KeepsPrefixes, KeepsStates, KVStore
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.torch_state import own_torch_state
from ollm_core.errors import (
    DamagedKVError,
    DoesNotFitError,
    InputError,
    NotFiniteError,
    OllmError,
)
from ollm_core.serving.admission import begin, best_known, num_kept, shared_beginning
from ollm_core.serving.live import LiveText, RequestedText, SharedPrefix
from ollm_core.serving.lone_drafts import LoneDrafts
from ollm_core.serving.model import ServedModel
from ollm_core.serving.prefixes import Prefixes, as_tensor
from ollm_core.serving.request import Event, Request
from ollm_core.serving.texts import GeneratedText, open_texts
from ollm_core.serving.token_budget import TokenBudget

_RESTARTS = 2  # of a text whose KV was damaged

Chosen = list[tuple[LiveText, int]]
"""Who takes part in a pass, each with how many new tokens."""


class _CancelledError(Exception):
    """Nobody waits for a pass any more."""


class Scheduler(Closing):
    """Runs requests over one KV store, which it owns."""

    def __init__(self, model: ServedModel, store: KVStore) -> None:
        self._model = model
        self._store = store
        self._prefixes = Prefixes(store, whole=isinstance(store, KeepsStates))
        self._budget = TokenBudget()
        self._drafts = LoneDrafts(model, store)
        self._waiting: list[RequestedText] = []
        self._running: list[LiveText] = []
        self._texts: dict[str, list[RequestedText]] = {}
        self._events: list[Event] = []
        self._num_texts = 0
        self._blocked = False
        """There was no room for one more, until one ends."""

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. Raises InputError for one that can never run."""
        self.check(request)
        texts = open_texts(request, self._model, self._num_texts)
        self._num_texts += len(texts)
        self._texts[request.request_id] = texts
        self._waiting += texts

    def check(self, request: Request) -> None:
        """Raises InputError for a request that can never run."""
        if request.request_id in self._texts:
            raise InputError(f"there is a request {request.request_id!r} already")
        self._model.check(request)

    def cancel(self, request_id: str) -> None:
        """Let go of a request: before the next pass, or in this one if nobody else is in it. From
        any thread; a request that has ended is ignored.
        """
        for text in [*self._texts.get(request_id, ())]:
            text.dropped = True

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Texts that are in no pass yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Texts that take part in passes."""
        return len(self._running)

    def num_read(self, request_id: str) -> int | None:
        """Tokens of a request that are read, of the text of it that has most; None while it waits
        for its first pass, and after its end. From any thread.
        """
        texts = [*self._texts.get(request_id, ())]
        running = [
            one
            for one in [*self._running]
            if one.sequence is not None and any(text in texts for text in one.texts)
        ]  # itself, or a beginning that it waits for with others
        return max((one.num_stored for one in running), default=None)

    def num_kept(self, token_ids: Sequence[int]) -> int:
        """How many tokens of a prompt were read before: for this scheduler, or for those that have
        left what they read in the store's prefix cache.
        """
        return num_kept(as_tensor(token_ids[:-1]), self._store, self._prefixes)

    def cached(self) -> list[tuple[tuple[int, int], Tensor]]:
        """See `Prefixes.cached`."""
        return self._prefixes.cached()

    def step(self) -> list[Event]:
        """Run one weight pass, if there is work; -> what happened. What fails is told in a Failed
        of each request that it concerns; only what is nobody's is raised.
        """
        with own_torch_state(), torch.no_grad():
            self._let_go()
            self._admit()
            if self._running and self._follow():
                self._pass(self._choose())
            self._let_go()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Give back all memory; the store saves what it keeps. May be called twice."""
        self._waiting.clear()
        self._running.clear()
        self._store.close()

    # Who has a sequence.

    def _admit(self) -> None:
        """Let texts that wait take part, as long as there is room for them."""
        self._blocked = self._blocked and bool(self._running)
        self._waiting.sort(key=lambda text: text.rank)
        for text in [*self._waiting]:
            if self._is_full:
                self._make_place(text)
            if self._is_full:
                return
            known = best_known(text, self._running, self._prefixes)
            coming = [one for one in self._running if isinstance(one, SharedPrefix)]
            if prefix := next((one for one in coming if one.is_of(text, known)), None):
                if text not in prefix.members:
                    prefix.members.append(text)
                continue
            length, members = shared_beginning(text, self._waiting, known, self._budget.tokens)
            next_one = SharedPrefix(text.token_ids[:length], members) if length else text
            if not self._begin(next_one):
                return

    @property
    def _is_full(self) -> bool:
        return self._blocked or len(self._running) >= self._model.max_running

    def _begin(self, text: LiveText) -> bool:
        """Give a text a sequence, if there is room for what it will be."""
        sequence, num_stored, num_found = begin(text, self._store, self._running, self._prefixes)
        text.sequence, text.num_stored = sequence, num_stored
        while not self._has_room(text) and not self._prefixes.give_way():
            if not self._running:  # alone: the pass refuses it, with the right words
                break
            self._store.release(sequence)
            text.lose_sequence()
            self._blocked = True
            return False
        self._model.engine.counters.count_cached(num_found)
        text.begin(num_stored)
        self._running.append(text)
        if isinstance(text, RequestedText):
            self._waiting.remove(text)
        elif not text.num_pending:
            self._end(text)
        return True

    def _has_room(self, text: LiveText) -> bool:
        """Whether all that run and `text` have memory for what they are expected to be."""
        ids = torch.zeros(1, dtype=torch.long, device="cpu")
        work = []
        for one in (*self._running, text):
            assert one.sequence is not None
            length = one.expected_length
            if self._model.max_positions is not None:
                length = min(length, self._model.max_positions)
            work.append(NewTokens(one.sequence, ids, max(length - 1, one.num_stored)))
        return self._model.engine.fits(self._store, work)

    def _make_place(self, text: LiveText) -> None:
        """Let the last of those that run wait, if it is to come after `text`."""
        last = max(self._running, key=lambda one: one.rank)
        if last.rank[0] > text.rank[0]:
            self._put_back(last)
            self._blocked = False

    def _put_back(self, text: LiveText) -> None:
        """Let one that runs wait again. What its sequence had is found in the prefix cache where
        there is one, else computed again.
        """
        assert text.sequence is not None
        self._running.remove(text)
        self._store.release(text.sequence)
        text.lose_sequence()
        if isinstance(text, RequestedText):
            self._waiting.append(text)

    def _let_go(self) -> None:
        """Drop what was cancelled."""
        for text in [one for one in (*self._running, *self._waiting) if one.cancelled]:
            if isinstance(text, RequestedText):
                self._events.append(text.finished("cancelled"))
            self._drop(text, keep=False)

    def _follow(self) -> bool:
        """Draft for a text that runs alone; False if that has ended it."""
        [alone] = self._running if len(self._running) == 1 else [None]
        text = alone if isinstance(alone, GeneratedText) else None
        try:
            self._drafts.follow(text)
            self._drafts.guess()
        except OllmError as error:
            assert text is not None
            self._fail(text, error)
            return False
        return True

    # Who takes part in the next pass.

    def _choose(self) -> Chosen:
        """All that decode; of prompts as much as may be read beside them. A prompt that nobody
        waits behind is read whole.
        """
        ranked = sorted(self._running, key=lambda text: text.rank)
        chosen = [(text, 1) for text in ranked if not text.reads]
        budget = self._budget.tokens
        behind = len(self._waiting) - sum(
            len(text.members) for text in ranked if isinstance(text, SharedPrefix)
        )
        alone = len(ranked) == 1 and behind <= 0
        left = budget if chosen else None
        has_long = False
        for text in ranked:
            if not text.reads:
                continue
            is_long = not alone and text.num_pending > budget
            if is_long and has_long:
                continue
            has_long = has_long or is_long
            most = budget if is_long else None
            num_new = text.part(most if left is None else left)
            if num_new:
                chosen.append((text, num_new))
                left = None if left is None else left - num_new
        return chosen

    # The pass.

    def _pass(self, chosen: Chosen) -> None:
        """Run a pass over those that were chosen, or over fewer where memory is short."""
        while chosen:
            texts = [text for text, _ in chosen]
            try:
                self._run(chosen)
            except _CancelledError:
                pass
            except DoesNotFitError as error:
                chosen = self._fewer(chosen, error)
                continue
            except DamagedKVError as error:
                self._restart(texts, error)
            except NotFiniteError as error:
                if len(chosen) > 1:  # one of them is to blame
                    middle = len(chosen) // 2
                    self._pass(chosen[:middle])
                    self._pass(chosen[middle:])
                else:
                    self._fail(texts[0], error)
            except (OllmError, OSError) as error:
                for text in texts:
                    self._fail(text, error)
            return

    def _run(self, chosen: Chosen) -> None:
        """One pass, and what comes of it."""
        texts = [text for text, _ in chosen]

        def check() -> None:
            if all(text.cancelled for text in texts):
                raise _CancelledError

        engine = self._model.engine
        start, (read_before, waited_before) = time.perf_counter(), engine.reading_seconds
        rows = engine.run(self._store, [text.work(number) for text, number in chosen], check)
        num_tokens = sum(number for _, number in chosen)
        seconds = time.perf_counter() - start
        read, waited = engine.reading_seconds
        self._budget.measured(num_tokens, seconds, read - read_before, waited - waited_before)
        for (text, number), logits in zip(chosen, rows, strict=True):
            begin, end = text.num_stored, text.num_stored + number
            assert text.sequence is not None
            text.note(begin, end, logits)
            num_drafted = len(text.draft) if isinstance(text, GeneratedText) else 0
            try:
                if text.num_pending:
                    self._events += [one.reading(end) for one in text.texts]
                else:
                    self._events += text.take(logits)
            except InputError as error:
                self._fail(text, error)
                continue
            if num_drafted:
                self._store.truncate(text.sequence, text.num_stored)
            if isinstance(text, GeneratedText) and text.num_new:
                self._drafts.checked(num_drafted, text.num_stored - end)
            if isinstance(self._store, KeepsPrefixes) and text.kept:
                new = text.token_ids[begin : text.num_stored]
                self._store.keep(text.sequence, begin, as_tensor(new))
            if text.ended:
                self._end(text)

    def _fewer(self, chosen: Chosen, error: DoesNotFitError) -> Chosen:
        """The same or less, after something has made room: prefixes that are kept, then those who
        come last. One that does not fit alone fails; if others hold memory meanwhile, it waits.
        """
        if self._prefixes.give_way():
            return chosen
        last = max((text for text, _ in chosen), key=lambda text: (text.reads, text.rank))
        if len(self._running) == 1:
            self._fail(last, error)
        elif len(chosen) == 1 or not last.reads:
            self._put_back(last)
            self._blocked = True
        return [(text, number) for text, number in chosen if text is not last]

    def _restart(self, texts: Sequence[LiveText], error: DamagedKVError) -> None:
        """Compute texts anew: what was found damaged is not found again."""
        for text in texts:
            for one in text.texts:
                one.num_restarts += 1
            if any(one.num_restarts > _RESTARTS for one in text.texts):
                self._fail(text, error)
            else:
                self._put_back(text)

    # How it ends.

    def _end(self, text: LiveText) -> None:
        """It is complete. Those who waited for a prefix find it when they are admitted."""
        if isinstance(text, RequestedText):
            assert text.ended
            self._events.append(text.finished(text.ended))
        self._drop(text, keep=text.kept)

    def _fail(self, text: LiveText, error: Exception) -> None:
        for one in text.texts:
            self._events.append(one.failed(error))
            if one is not text:
                self._drop(one, keep=False)
        self._drop(text, keep=False)

    def _drop(self, text: LiveText, *, keep: bool) -> None:
        self._blocked = False
        if text in self._running:
            self._running.remove(text)
            assert text.sequence is not None
            if keep:
                self._prefixes.keep(text.sequence, text.token_ids[: text.num_stored])
            else:
                self._store.release(text.sequence)
        if isinstance(text, RequestedText):
            text.dropped = True
            if text in self._waiting:
                self._waiting.remove(text)
            texts = self._texts[text.request.request_id]
            texts.remove(text)
            if not texts:
                del self._texts[text.request.request_id]
