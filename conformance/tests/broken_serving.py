"""Schedulers that are wrong in one way each, over a good model of the Llama adapter. Each wraps
`ollm.load`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from broken import broken_adapter

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core.serving.prefixes import Prefixes
from ollm_core.serving.scheduler import Scheduler
from ollm_core.serving.texts import GeneratedText, ScoredText


def _with_scheduler(change: Callable[[Scheduler], None]) -> Callable[..., Any]:
    """A way to open a model whose schedulers are changed by `change`."""

    def load(*args, **options):
        model = ollm.load(*args, **options)
        real = model.open_scheduler

        @functools.wraps(real)
        def open_scheduler(*given, **named):
            scheduler = real(*given, **named)
            change(scheduler)
            return scheduler

        model.open_scheduler = open_scheduler
        return model

    load.__name__ = change.__name__
    return load


def one_generator_for_all(scheduler):
    """Every token that anybody is given moves the generators of all."""
    real = scheduler.step

    def step():
        for one in [*scheduler._running]:
            if isinstance(one, GeneratedText) and one._sampler._generator is not None:
                torch.rand(len(scheduler._running) - 1, generator=one._sampler._generator)
        return real()

    scheduler.step = step


class _OneLonger(Prefixes):
    def fork(self, token_ids, longer_than=0):
        found = super().fork(token_ids, longer_than)
        return found and (found[0], found[1] + (found[1] + 1 < len(token_ids)))


def beginnings_one_longer(scheduler):
    """A text that goes on from an earlier one is taken to have one token more than it shares."""
    scheduler._prefixes = _OneLonger(scheduler._store, whole=scheduler._prefixes.whole)


def first_logits_for_all(scheduler):
    """Where one reads while others decode, all get the logits of the first."""
    real = scheduler._model.engine.run

    def run(store, work, check=None):
        found = real(store, work, check)
        mixed = len({len(item.token_ids) for item in work}) > 1
        return [found[0]] * len(found) if mixed else found

    scheduler._model.engine.run = run


def who_leaves_takes_the_last_with_it(scheduler):
    """When a text ends, one that decodes beside it loses its latest token."""
    real = scheduler._end

    def end(text):
        real(text)
        for other in scheduler._running:
            if isinstance(other, GeneratedText) and other.num_new > 1:
                other.token_ids[-1] = other.token_ids[-2]
                return

    scheduler._end = end


def cancelled_ones_go_on(scheduler):
    """Nobody listens to `cancel` until a text has three tokens more."""
    real = scheduler._let_go

    def let_go():
        texts = [t for t in scheduler._running if isinstance(t, GeneratedText) and t.dropped]
        late = [text for text in texts if text.num_new < 3]
        for text in late:
            text.dropped = False
        real()
        for text in late:
            text.dropped = True

    scheduler._let_go = let_go


def sequences_stay(scheduler):
    """What a cancelled text held is not given back."""
    scheduler._store.release = lambda sequence: None


def ends_as_if_done(scheduler):
    """A cancelled text is told to have ended."""
    real = scheduler.step

    def step():
        return [
            type(event)(event.request_id, event.index, "stop", event.text, event.counts)
            if getattr(event, "reason", None) == "cancelled"
            else event
            for event in real()
        ]

    scheduler.step = step


def scores_one_early(scheduler):
    """Each token is scored by the logits behind it, its own."""
    real = scheduler.add

    def add(request):
        real(request)
        for text in scheduler._texts[request.request_id]:
            if isinstance(text, ScoredText):
                text.token_ids = [*text.token_ids[1:], text.token_ids[-1]]

    scheduler.add = add


def scores_of_the_last_part(scheduler):
    """Of a long continuation the tokens after the first part are scored in turned order."""
    real = ScoredText.note

    def note(text, begin, end, logits):
        real(text, begin, end, logits.flip(0) if begin > text._told.first else logits)

    real_add = scheduler.add

    def add(request):
        real_add(request)
        for text in scheduler._texts[request.request_id]:
            if isinstance(text, ScoredText):
                text.note = functools.partial(note, text)

    scheduler.add = add


def _broken(check, sentence, change):
    return broken_adapter(check, sentence, LlamaAdapter, load=_with_scheduler(change))


BROKEN_SERVING = [
    _broken("serving.joins", "Texts draw from one generator.", one_generator_for_all),
    _broken("serving.joins", "A beginning is taken for longer.", beginnings_one_longer),
    _broken("serving.joins", "Rows beside a prompt get its logits.", first_logits_for_all),
    _broken("serving.joins", "Who leaves changes another.", who_leaves_takes_the_last_with_it),
    _broken("serving.cancel", "A cancelled text goes on.", cancelled_ones_go_on),
    _broken("serving.cancel", "A cancelled text keeps its memory.", sequences_stay),
    _broken("serving.cancel", "A cancelled text is told to be done.", ends_as_if_done),
    _broken("serving.score", "A token is scored by its own logits.", scores_one_early),
    _broken("serving.score", "Later parts are scored in turned order.", scores_of_the_last_part),
]
