"""The scheduler: requests together give what each gives alone, in fewer weight passes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_requests import finish, greedy, tokens

from ollm_core.engine.batch import num_new_tokens
from ollm_core.errors import DamagedKVError, DoesNotFitError, InputError, NotFiniteError, ReadError
from ollm_core.serving.offline import Answered, run_all
from ollm_core.serving.request import (
    Choices,
    Failed,
    Finished,
    NewToken,
    Reading,
    Request,
    SamplingParams,
    Score,
    Scored,
)


def test_one_request_is_greedy_decoding(model, ids, alone):
    """A lone prompt is read in one pass, and each token is one more."""
    request = greedy(ids(150), 8)
    with model.open_scheduler() as scheduler:
        scheduler.add(request)
        events = finish(scheduler)
    assert tokens(events, request) == alone(ids(150), 8)
    assert model.stats.weight_passes == 8 + 8  # these, and those of `alone`
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.reason == "length"
    assert (last.counts.num_prompt_tokens, last.counts.num_new_tokens) == (150, 8)


def test_requests_together_give_the_tokens_of_each_alone(model, ids, alone):
    """Unequal prompts and lengths share passes; nobody's text is another one for it."""
    prompts = [(ids(5, 1), 9), (ids(300, 2), 3), (ids(64, 3), 12), (ids(1, 4), 5)]
    requests = [greedy(prompt, num_new) for prompt, num_new in prompts]
    with model.open_scheduler() as scheduler:
        found = run_all(scheduler, requests)
    passes = model.stats.weight_passes
    assert [answers[0].token_ids for answers in found] == [alone(*one) for one in prompts]
    assert passes < 9 + 3 + 12 + 5
    assert passes <= 14


def test_a_common_beginning_is_read_once(model, ids, alone):
    """Questions on one document: it is read in a pass of its own, then all of them in another."""
    document, budget = ids(300), 256
    prompts = [document + ids(10, seed) for seed in (1, 2, 3, 4)]
    with model.open_scheduler() as scheduler:
        found = run_all(scheduler, [greedy(prompt, 4) for prompt in prompts])
    stats = model.stats
    assert stats.weight_passes == 1 + 4
    assert stats.prefill_tokens == 300 + 4 * 10
    assert len(document) > budget
    assert [answers[0].token_ids for answers in found] == [alone(one, 4) for one in prompts]
    assert {answers[0].counts.num_cached_tokens for answers in found} == {300}


def test_beginnings_within_beginnings_are_found(model, ids, alone):
    """What all share is read once, and what some of them share beyond it, too."""
    system, first, second = ids(200), ids(270, 1), ids(260, 2)
    prompts = [system + first + ids(9, 3), system + first + ids(9, 4)]
    prompts += [system + second + ids(9, 5), system + second + ids(9, 6)]
    with model.open_scheduler() as scheduler:
        found = run_all(scheduler, [greedy(prompt, 3) for prompt in prompts])
    # The first two decode a token while the other document is read.
    assert model.stats.prefill_tokens == 200 + 270 + 260 + 4 * 9 + 2
    assert [answers[0].token_ids for answers in found] == [alone(one, 3) for one in prompts]


def test_who_comes_later_joins(model, ids, alone):
    """A request that comes while others decode takes part in the next pass."""
    first, second = greedy(ids(40, 1), 10), greedy(ids(30, 2), 4)
    with model.open_scheduler() as scheduler:
        scheduler.add(first)
        events = [event for _ in range(4) for event in scheduler.step()]
        scheduler.add(second)
        events += finish(scheduler)
    assert model.stats.weight_passes == 10
    assert tokens(events, first) == alone(ids(40, 1), 10)
    assert tokens(events, second) == alone(ids(30, 2), 4)


def test_a_later_turn_goes_on_where_the_first_ended(model, ids, alone):
    """What was answered is not read again."""
    with model.open_scheduler() as scheduler:
        [[answer]] = run_all(scheduler, [greedy(ids(90), 6)])
        longer = ids(90) + answer.token_ids + ids(7, 1)
        [[second]] = run_all(scheduler, [greedy(longer, 5)])
    assert second.counts.num_cached_tokens == 90 + 5  # the last token was never computed
    assert second.token_ids == alone(longer, 5)


def test_a_long_prompt_is_read_in_parts_while_others_decode(model, ids, alone):
    """Who decodes gets a token of each pass, and the prompt its part."""
    short, long = greedy(ids(20, 1), 12), greedy(ids(400, 2), 2)
    with model.open_scheduler() as scheduler:
        scheduler.add(short)
        events = scheduler.step()
        scheduler.add(long)
        while not scheduler.is_idle:
            new = scheduler.step()
            if any(isinstance(event, Reading) for event in new):
                assert [e for e in new if isinstance(e, NewToken)]
            events += new
    parts = [event.num_tokens for event in events if isinstance(event, Reading)]
    assert parts
    assert all(part % 64 == 0 for part in parts)
    assert tokens(events, short) == alone(ids(20, 1), 12)
    assert tokens(events, long) == alone(ids(400, 2), 2)


class SlowDisk:
    """A clock by which a pass takes as long as it reads or computes, whichever is longer: real
    passes of a model whose weights come from a slow disk.
    """

    def __init__(self, monkeypatch, engine, read_seconds: float, tokens_per_second: float) -> None:
        self.passes: list[int] = []
        self._now = self._read = self._waited = 0.0
        run = engine.run

        def timed(store, work, check=None):
            found = run(store, work, check)
            computing = num_new_tokens(work) / tokens_per_second
            self.passes.append(num_new_tokens(work))
            self._now += max(computing, read_seconds)
            self._read += read_seconds
            self._waited += max(read_seconds - computing, 0.0)
            return found

        clock = SimpleNamespace(perf_counter=lambda: self._now)
        monkeypatch.setattr("ollm_core.serving.scheduler.time", clock)
        monkeypatch.setattr(engine, "run", timed)
        both = property(lambda _: (self._read, self._waited))
        monkeypatch.setattr(type(engine), "reading_seconds", both)


def test_prompts_are_read_as_fast_as_a_slow_disk_hides_it(model, ids, alone, monkeypatch):
    """20 prompts of 128 tokens come while a text decodes; 600 tokens are computed while the weights
    are read. What waits for the disk is no computing: passes soon have as many, and never so many
    that the text waits for them.
    """
    disk = SlowDisk(monkeypatch, model.engine, read_seconds=2.0, tokens_per_second=300)
    chat, rows = greedy(ids(20), 9), [greedy(ids(128, seed), 2) for seed in range(1, 21)]
    with model.open_scheduler() as scheduler:
        scheduler.add(chat)
        events = scheduler.step()
        for row in rows:
            scheduler.add(row)
        events += finish(scheduler)
    reading = [size for size in disk.passes if size > 20]
    assert len(reading) <= 6  # 5 if all had 600, 10 if all had 256
    assert max(disk.passes) <= 600 + len(rows)
    monkeypatch.undo()
    assert tokens(events, rows[-1]) == alone(ids(128, 20), 2)


def test_a_lone_prompt_is_one_pass(model, ids):
    """However long it is: parts would read the weights again."""
    with model.open_scheduler() as scheduler:
        run_all(scheduler, [greedy(ids(900), 1)])
    assert model.stats.weight_passes == 1


def test_cancelled_requests_leave_their_place(model, ids, alone):
    """The others go on as if it had never been there."""
    gone, stays = greedy(ids(40, 1), 50), greedy(ids(30, 2), 6)
    with model.open_scheduler() as scheduler:
        scheduler.add(gone)
        scheduler.add(stays)
        scheduler.step()
        scheduler.cancel(gone.request_id)
        events = finish(scheduler)
        assert scheduler.num_running == 0
    assert [event.reason for event in events if isinstance(event, Finished)] == [
        "cancelled",
        "length",
    ]
    assert len(tokens(events, gone)) == 0
    assert model.stats.weight_passes == 6
    assert len(tokens(events, stays)) == 5  # the first came before


def test_a_pass_that_nobody_waits_for_is_broken_off(model, ids):
    """In its middle; nothing of it is kept, and the next request runs."""
    request, reports = greedy(ids(300), 4), []
    with model.open_scheduler() as scheduler:

        def cancel(progress):
            reports.append(progress)
            if progress.steps_done == 3:
                scheduler.cancel(request.request_id)

        model.on_progress(cancel)
        scheduler.add(request)
        [event] = scheduler.step()
        model.on_progress(None)
        assert event.reason == "cancelled"
        assert reports[-1].steps_done <= 4
        assert reports[-1].steps_total > 5
        assert model.stats.weight_passes == 0
        [[answer]] = run_all(scheduler, [greedy(ids(10), 2)])
    assert len(answer.token_ids) == 2


def test_who_comes_first_by_priority_takes_the_place_of_others(model, ids, alone):
    """Where there is one place, a chat goes before a batch, which then goes on where it was."""
    batch, chat = greedy(ids(70, 1), 9, priority=1), greedy(ids(50, 2), 3)
    with model.open_scheduler() as scheduler:
        scheduler._model = _with_one_place(scheduler._model)
        scheduler.add(batch)
        events = scheduler.step() + scheduler.step()
        scheduler.add(chat)
        events += finish(scheduler)
    ends = [event.request_id for event in events if isinstance(event, Finished)]
    assert ends == [chat.request_id, batch.request_id]
    assert tokens(events, batch) == alone(ids(70, 1), 9)
    assert tokens(events, chat) == alone(ids(50, 2), 3)


def _with_one_place(model):
    from dataclasses import replace

    return replace(model, max_running=1)


def test_more_requests_than_memory(make_llama, ids):
    """Some wait until others have ended; what one alone cannot have is refused, to it alone."""
    from ollm_core.api import load

    path = make_llama(torch.float32)
    with load(path, device="cpu", kv="host", host_memory=400_000, chunk_size=64) as small:
        requests = [greedy(ids(200, seed), 4) for seed in range(6)]
        too_long = greedy(ids(3000), 2)
        with small.open_scheduler() as scheduler:
            scheduler.add(too_long)
            for request in requests:
                scheduler.add(request)
            events = finish(scheduler)
        host_peak, limit = small.stats.host_peak_bytes, small.stats.host_limit_bytes
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.request_id for event in failed] == [too_long.request_id]
    assert isinstance(failed[0].error, DoesNotFitError)
    assert host_peak <= limit
    with load(path, device="cpu", chunk_size=64) as roomy, roomy.open_scheduler() as scheduler:
        expected = run_all(scheduler, requests)
    for request, answers in zip(requests, expected, strict=True):
        assert tokens(events, request) == answers[0].token_ids


@pytest.mark.parametrize("error", [ReadError("the disk is gone"), OSError(5, "input/output error")])
def test_a_failed_pass_is_told_to_those_in_it(model, ids, monkeypatch, error):
    """And the next request runs."""
    run, calls = model.engine.run, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return run(*arguments)

    monkeypatch.setattr(model.engine, "run", fail_once)
    with model.open_scheduler() as scheduler:
        scheduler.add(greedy(ids(20), 4))
        [event] = scheduler.step()
        assert event.error is error
        [[answer]] = run_all(scheduler, [greedy(ids(20), 4)])
    assert len(answer.token_ids) == 4


def test_who_is_to_blame_for_no_numbers_fails_alone(model, ids, alone, monkeypatch):
    """The others of the same pass get their tokens."""
    run, bad = model.engine.run, ids(77, 3)

    def poisoned(store, work, check=None):
        if any(len(item.token_ids) == len(bad) for item in work):
            raise NotFiniteError("the logits are no numbers")
        return run(store, work, check)

    monkeypatch.setattr(model.engine, "run", poisoned)
    good = [greedy(ids(20, seed), 4) for seed in range(4)]
    wrong = greedy(bad, 4)
    with model.open_scheduler() as scheduler:
        for request in (*good[:2], wrong, *good[2:]):
            scheduler.add(request)
        events = finish(scheduler)
    assert [e.request_id for e in events if isinstance(e, Failed)] == [wrong.request_id]
    for seed, request in enumerate(good):
        assert tokens(events, request) == alone(ids(20, seed), 4)


def test_damaged_kv_is_computed_again(model, ids, alone, monkeypatch):
    """The text is as it would have been; damage that stays is told in the end."""
    run, calls = model.engine.run, []

    def damaged(store, work, check=None):
        calls.append(work)
        if len(calls) == 3:
            raise DamagedKVError("a block is not what was written")
        return run(store, work, check)

    monkeypatch.setattr(model.engine, "run", damaged)
    request = greedy(ids(90), 6)
    with model.open_scheduler() as scheduler:
        scheduler.add(request)
        events = finish(scheduler)
    monkeypatch.undo()
    assert tokens(events, request) == alone(ids(90), 6)

    def always(store, work, check=None):
        raise DamagedKVError("a block is not what was written")

    monkeypatch.setattr(model.engine, "run", always)
    with model.open_scheduler() as scheduler:
        for prompt in (ids(90), ids(300), ids(300) + ids(5, 1)):
            scheduler.add(greedy(prompt, 6))
        ends = finish(scheduler)
    assert [type(event) for event in ends] == [Failed] * 3


def test_scores_are_those_of_the_forward_pass(model, ids):
    """Log-probabilities of a continuation, alone and with others that share its prompt."""
    prompt, ends = ids(130), [ids(3, 1), ids(9, 2), ids(1, 3), ids(300, 4)]
    requests = [Request(token_ids=prompt + end, wanted=Score(len(end), top=2)) for end in ends]
    with model.open_scheduler() as scheduler:
        found = run_all(scheduler, requests)
    for end, answers in zip(ends, found, strict=True):
        logits = model(input_ids=torch.tensor([prompt + end])).logits[0].log_softmax(-1)
        rows = logits[len(prompt) - 1 : -1]
        expected = rows[range(len(end)), end]
        scored = answers[0].scored
        assert torch.allclose(torch.tensor(scored.logprobs), expected, atol=1e-4)
        assert list(scored.greedy) == (rows.argmax(-1) == torch.tensor(end)).tolist()
        most = [[token_id for token_id, _ in one] for one in scored.top]
        assert most == rows.topk(2).indices.tolist()
        assert torch.allclose(
            torch.tensor([[logprob for _, logprob in one] for one in scored.top]),
            rows.topk(2).values,
            atol=1e-4,
        )


@pytest.mark.parametrize(("length", "num_answers"), [(20, 1), (300, 1), (70, 3), (1, 1)])
def test_an_answer_scores_its_prompt_and_computes_it_once(model, ids, length, num_answers):
    """The same scores as alone, and the same answers; before their first tokens."""
    prompt = ids(length)
    plain = greedy(prompt, 6, n=num_answers)
    alone = Request(token_ids=prompt, wanted=Score(max(length - 1, 1), top=3), keep=False)
    with model.open_scheduler() as scheduler:
        [answers] = run_all(scheduler, [plain])
        [[scored]] = run_all(scheduler, [alone]) if length > 1 else [[None]]
    request = greedy(prompt, 6, n=num_answers, prompt_logprobs=3)
    passes = {}
    model.on_progress(lambda one: passes.update({one.weight_passes: one.num_new_tokens}))
    with model.open_scheduler() as scheduler:
        scheduler.add(request)
        events = finish(scheduler)
    computed = sum(passes.values())
    found = [Answered() for _ in range(num_answers)]
    for event in events:
        found[event.index].add(event)
    assert [one.token_ids for one in found] == [one.token_ids for one in answers]
    if length > 1:
        assert found[0].scored.logprobs == pytest.approx(scored.scored.logprobs, abs=1e-4)
        assert found[0].scored.greedy == scored.scored.greedy
        both = [one.scored.top for one in (found[0], scored)]
        assert [[token for token, _ in place] for place in both[0]] == [
            [token for token, _ in place] for place in both[1]
        ]
    else:
        assert found[0].scored.logprobs == ()
    assert [one.scored for one in found[1:]] == [None] * (num_answers - 1)
    if num_answers == 1:
        assert computed == length + 5  # the first new token is the prompt's
    first = next(event for event in events if isinstance(event, NewToken) and not event.index)
    told = next(event for event in events if isinstance(event, Scored))
    assert events.index(told) < events.index(first)


def test_choices_are_the_next_tokens_probabilities(model, ids):
    """Of the tokens that were asked about, in their order."""
    wanted = (7, 100, 3)
    with model.open_scheduler() as scheduler:
        [[answer]] = run_all(scheduler, [Request(token_ids=ids(50), wanted=Choices(wanted))])
    logprobs = model(input_ids=torch.tensor([ids(50)])).logits[0, -1].log_softmax(-1)
    expected = logprobs[list(wanted)]
    assert torch.allclose(torch.tensor(answer.scored.logprobs), expected, atol=1e-4)


def test_many_answers_to_one_prompt_share_it(model, ids):
    """Each has a seed of its own, and the prompt is read once."""
    request = Request(
        token_ids=ids(100), wanted=SamplingParams(n=5, max_tokens=6, seed=3, ignore_eos=True)
    )
    with model.open_scheduler() as scheduler:
        [answers] = run_all(scheduler, [request])
    assert len({tuple(answer.token_ids) for answer in answers}) == 5
    assert model.stats.prefill_tokens == 99


@pytest.mark.parametrize(
    ("request_of", "words"),
    [
        (lambda ids: greedy([]), "the prompt is empty"),
        (lambda ids: greedy([5, 199]), "token id 199 is not in the vocabulary of 199"),
        (lambda ids: greedy([-1]), "token id -1 is not"),
        (lambda ids: greedy(ids(4097)), "4097 tokens are past the model's 4096 positions"),
        (lambda ids: Request(token_ids=[5], wanted=Score(1)), "score: need 1 to 0 of 1 tokens"),
        (lambda ids: Request(token_ids=[5], wanted=Choices((199,))), "token id 199"),
        (lambda ids: greedy([5], stop="x"), "stop: need a tokenizer"),
    ],
)
def test_what_can_never_run_is_refused_at_once(model, ids, request_of, words):
    """With one line, and nothing waits for it."""
    with model.open_scheduler() as scheduler:
        with pytest.raises(InputError, match=words):
            scheduler.add(request_of(ids))
        assert scheduler.is_idle


def test_an_answer_ends_with_the_models_positions(model, ids):
    """As many tokens as can be computed, and one that comes of the last."""
    with model.open_scheduler() as scheduler:
        [[answer]] = run_all(scheduler, [greedy(ids(4094), 50)])
    assert len(answer.token_ids) == 3
    assert answer.finish_reason == "length"


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_whatever_comes_and_goes(model, ids, alone, data):
    """Requests with common beginnings come at any time and some are cancelled: each of the others
    has the tokens that it has alone, and nothing is left in the store.
    """
    heads = [ids(n, seed) for n, seed in ((0, 0), (150, 1), (280, 2))]
    expected = {}
    with model.open_scheduler() as scheduler:
        events, live = [], []
        for number in range(data.draw(st.integers(1, 6), "requests")):
            head = data.draw(st.sampled_from(heads), "head")
            prompt = head + ids(data.draw(st.integers(1, 40), "tail"), 10 + number)
            request = greedy(
                prompt, data.draw(st.integers(1, 6), "new"), keep=data.draw(st.booleans())
            )
            scheduler.add(request)
            live.append(request)
            expected[request.request_id] = request
            for _ in range(data.draw(st.integers(0, 3), "steps")):
                events += scheduler.step()
            if data.draw(st.integers(0, 4), "cancel") == 0:
                gone = data.draw(st.sampled_from(live), "who")
                scheduler.cancel(gone.request_id)
                expected.pop(gone.request_id, None)
        events += finish(scheduler)
        scheduler._prefixes.clear()
        held = scheduler._store.tier_bytes()
        assert (held.device, held.host, held.disk) == (0, 0, 0)
    for request in expected.values():
        found = alone(list(request.token_ids), request.wanted.max_tokens)
        assert tokens(events, request) == found
