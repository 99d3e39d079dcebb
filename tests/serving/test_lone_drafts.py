"""Drafts in the scheduler: a text that runs alone takes fewer passes, and stays the same."""

from __future__ import annotations

import pytest
import torch
from text_requests import finish, greedy, tokens

from ollm_core.api import load
from ollm_core.drafting.text_drafts import NUM_DRAFT_TOKENS
from ollm_core.errors import DoesNotFitError, PluginError
from ollm_core.serving.request import Failed, Finished, Request, SamplingParams


class Oracle:
    """Knows the text; right for `num_right` tokens of each draft, then wrong."""

    def __init__(self, text, num_right=NUM_DRAFT_TOKENS):
        self.text, self.num_right = list(text), num_right
        self.num_asked = 0

    def __call__(self, token_ids, num_tokens):
        self.num_asked += 1
        draft = torch.tensor(self.text[len(token_ids) : len(token_ids) + num_tokens])
        draft[self.num_right :] = (draft[self.num_right :] + 1) % 199
        return draft


def run(model, *requests):
    """The events of a scheduler's run, and the passes it took."""
    before = model.stats.weight_passes
    with model.open_scheduler() as scheduler:
        for request in requests:
            scheduler.add(request)
        events = finish(scheduler)
    return events, model.stats.weight_passes - before


@pytest.mark.parametrize(("num_right", "passes"), [(10, 5), (4, 9), (0, 40)])
def test_a_draft_changes_passes_and_no_token(model, ids, alone, num_right, passes):
    """As many as transformers' assisted decoding takes: prompt, then right ones and one more."""
    text = alone(ids(100), 40)
    model.draft_with(Oracle([*ids(100), *text], num_right), NUM_DRAFT_TOKENS)
    request = greedy(ids(100), 40)
    events, took = run(model, request)
    assert tokens(events, request) == text
    assert took == passes
    assert model.stats.accepted_tokens == 40 - passes


def test_a_seed_repeats_a_text_with_drafts(model, ids):
    """Each token is the text's own choice, so a guess changes none."""
    sampling = SamplingParams(temperature=0.8, top_k=40, seed=7, max_tokens=30, ignore_eos=True)
    request = Request(token_ids=ids(30), wanted=sampling)
    plain = tokens(run(model, request)[0], request)
    model.draft_with(Oracle([*ids(30), *plain], 3), NUM_DRAFT_TOKENS)
    again = Request(token_ids=ids(30), wanted=sampling)
    events, took = run(model, again)
    assert tokens(events, again) == plain
    assert took < 30


@pytest.mark.parametrize("at", range(4))
def test_a_text_ends_inside_a_draft(model, ids, alone, at):
    """At a token of the user's, and at its length."""
    text = alone(ids(30), 30)
    end = text[10 + at]
    length = text.index(end) + 1
    model.draft_with(Oracle([*ids(30), *text]), NUM_DRAFT_TOKENS)
    for request in (greedy(ids(30), 30, stop_token_ids=[end]), greedy(ids(30), length)):
        events, _ = run(model, request)
        assert tokens(events, request) == text[:length]
        assert isinstance(events[-1], Finished)


def test_up_to_the_last_position(make_llama, ids):
    """A draft is cut there, where plain decoding still goes on."""
    with load(make_llama(torch.float32, max_position_embeddings=64), device="cpu") as model:
        request = greedy(ids(50), 40)
        text = tokens(run(model, request)[0], request)
        assert len(text) == 15
        model.draft_with(Oracle([*ids(50), *text, *ids(9)]), NUM_DRAFT_TOKENS)
        again = greedy(ids(50), 40)
        events, took = run(model, again)
        assert tokens(events, again) == text
        assert took == 3


def test_texts_that_share_passes_are_not_drafted_for(model, ids, alone):
    """The source is asked before the second comes and after it has gone."""
    text, other = alone(ids(40), 24), alone(ids(25, 1), 4)
    oracle = Oracle([*ids(40), *text], 2)
    model.draft_with(oracle, 4)
    first, second = greedy(ids(40), 24), greedy(ids(25, 1), 4)
    with model.open_scheduler() as scheduler:
        scheduler.add(first)
        events = scheduler.step() + scheduler.step()
        before = oracle.num_asked
        assert before
        scheduler.add(second)
        while scheduler.num_running + scheduler.num_waiting > 1:
            events += scheduler.step()
        assert oracle.num_asked == before
        events += finish(scheduler)
    assert oracle.num_asked > before
    assert tokens(events, first) == text
    assert tokens(events, second) == other


def test_a_drafted_text_is_found_again(make_llama, ids, tmp_path):
    """What was wrong in a draft is no part of the prefix that stays on disk."""
    options = {"device": "cpu", "kv": "disk", "kv_dir": tmp_path / "kv", "chunk_size": 64}
    directory = make_llama(torch.float32)
    with load(directory, device="cpu", chunk_size=64) as model:
        request = greedy(ids(100), 60)
        text = tokens(run(model, request)[0], request)
        longer = greedy([*ids(100), *text, *ids(3, 5)], 6)
        expected = tokens(run(model, longer)[0], longer)
    with load(directory, **options) as model:
        model.draft_with(Oracle([*ids(100), *text], 3), NUM_DRAFT_TOKENS)
        request = greedy(ids(100), 60)
        assert tokens(run(model, request)[0], request) == text
    with load(directory, **options) as model:
        longer = greedy([*ids(100), *text, *ids(3, 5)], 6)
        assert tokens(run(model, longer)[0], longer) == expected
        assert model.stats.cached_tokens == 159


class Nonsense:
    """No draft source: it gives what is no token, or has no room."""

    def __init__(self, error=None):
        self.error = error

    def begin(self, num_tokens):
        if self.error and num_tokens:
            raise self.error

    def catch_up(self, token_ids):
        pass

    def __call__(self, token_ids, num_tokens):
        return [999]


@pytest.mark.parametrize("error", [None, DoesNotFitError("host memory: need 2 B, have 1 B")])
def test_what_a_source_cannot_do_ends_its_text(model, ids, alone, error):
    """One line, and the next text runs."""
    model.draft_with(Nonsense(error), 4)
    [*_, last], _ = run(model, greedy(ids(20), 8))
    assert isinstance(last, Failed)
    assert isinstance(last.error, PluginError if error is None else DoesNotFitError)
    model.draft_with(None)
    again = greedy(ids(20), 8)
    assert tokens(run(model, again)[0], again) == alone(ids(20), 8)
