"""Batches in a session that others ask, too."""

from __future__ import annotations

import threading

import pytest
from text_requests import greedy

from ollm_core.api import load
from ollm_core.serving.jobs.shared import SharedModel, SharedSteps, StoppedError
from ollm_core.serving.offline import run_each
from ollm_core.serving.session import Session


@pytest.fixture
def session(tiny_chat):
    """One of a tiny model, and the model."""
    with load(tiny_chat, device="cpu") as model, Session(model.open_scheduler()) as opened:
        yield opened, model


def tokens(found):
    """Of each request, by its prompt."""
    return {tuple(request.token_ids): answers[0].token_ids for request, answers in found}


def run_to_end(steps):
    """Which never comes by itself."""
    while True:
        steps.step()


def test_rows_are_answered_beside_others(session):
    """As by a scheduler of their own; one that can never run ends at once."""
    opened, model = session
    requests = [greedy([number + 5, 9], 4 + number) for number in range(5)]
    with model.open_scheduler() as scheduler:
        alone = tokens(run_each(scheduler, requests))
    other = opened.submit(greedy([7], 150))
    with SharedModel(model.served, opened).open_scheduler(100) as steps:
        again = [greedy(list(request.token_ids), request.wanted.max_tokens) for request in requests]
        assert tokens(run_each(steps, again)) == alone
        [(_, [refused])] = run_each(steps, [greedy([10_000])])
        assert "vocabulary" in str(refused.error)
    assert len([*other]) > 100


def test_stopping_cancels_what_runs(session):
    """From another thread; the session goes on."""
    opened, model = session
    shared = SharedModel(model.served, opened)
    threading.Timer(0.05, shared.stop).start()
    with shared.open_scheduler() as steps, pytest.raises(StoppedError):
        for _ in run_each(steps, (greedy([5, n % 90 + 9], 200) for n in range(10_000)), ahead=4):
            pass
    assert len([*opened.submit(greedy([5], 2))]) == 3


def test_the_end_of_the_session_is_no_failure_of_rows(session):
    """They are left to the next run."""
    opened, _ = session
    steps = SharedSteps(opened)
    for number in range(3):
        steps.add(greedy([5, number + 9], 200))
    steps.step()
    opened.close()
    with pytest.raises(StoppedError):
        run_to_end(steps)


def test_a_batch_has_a_tokenizer_of_its_own(session):
    """Others decode with the model's meanwhile."""
    opened, model = session
    assert SharedModel(model.served, opened).served.tokenizer is not model.tokenizer
