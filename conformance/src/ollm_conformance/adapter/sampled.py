"""Checks of answers that are made in any way: options of requests, dealt at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_tokens
from ollm_conformance.expected_answers import Expected, told
from ollm_conformance.seeds import run_seed
from ollm_conformance.subject import Subject
from ollm_conformance.wishes import (
    SEED,
    Words,
    checkpoint_values,
    requests,
    ruled_requests,
    single_requests,
)
from ollm_core.testing import (
    Answered,
    NewToken,
    Request,
    SamplingParams,
    Scheduler,
    StreamedModel,
    limit_running,
    supports,
)

_AHEAD = 4
"""Tokens of a draft."""
_MOST_STEPS = 1000


class Sampled(AdapterSuite):
    """Options of requests."""

    @check(
        "serving.sampling",
        "Whatever options requests have that join, decode and leave together, or are cancelled, "
        "each token is one that transformers' own processors allow, those of the checkpoint's "
        "generation config too, a greedy one the likeliest of them; log-probabilities, texts and "
        "ends are those that were asked for, and what chance has no part in, or a seed, is the "
        "same again alone and with drafts.",
        look="core chooses tokens: an adapter has no part in it; run exact.decode first",
        needs=["batch"],
    )
    def test_sampling(self, subject: Subject) -> None:
        draw, words = random.Random(run_seed()), Words(subject.vocab_size)
        documents = [subject.prompt(130, seed=number) for number in (100, 101)]
        asked = requests(subject.vocab_size, documents, draw)
        singles = single_requests(subject.vocab_size, draw)
        with subject.open() as model:
            model.tokenizer = words.tokenizer()
            model.generation_config.eos_token_id = [*range(14, subject.vocab_size, 9)]
            with model.open_scheduler() as scheduler:
                answers = _in_any_order(scheduler, [*asked, *singles], _to_cancel(subject), draw)
            expected = Expected(subject.reference(), words, model.served.end_ids)
            for request in (*asked, *singles):
                expected.check(request, answers[request.request_id])
            again = [request for request in asked if _repeats(request)]
            again += [one for one in singles if _repeats(one) and _seed(one) != SEED]
            if supports(subject.adapter, "drafts") and supports(subject.adapter, "truncate"):
                model.draft_with(_KnowsMore([*again, *singles], answers), _AHEAD)
            for request in again:
                [found] = model.answer([_asked_for_more(request, answers, subject.vocab_size)])
                for one, before in zip(found, answers[request.request_id], strict=True):
                    what = f"tokens {told(request)}, said again alone"
                    same_tokens(one.token_ids, before.token_ids, what)
                    assert one.text == before.text, (
                        f"{what}: expected the text {before.text!r}, got {one.text!r}"
                    )
            for request in _ended_inside(singles, answers, words):
                [found] = model.answer([request])
                expected.check(request, found)
            _by_the_checkpoint(subject, model, expected, draw)

    @check(
        "serving.order",
        "Of requests that wait those of a lower number begin first, and one that must not be kept "
        "leaves nothing that a later one finds.",
        look="core orders requests: an adapter has no part in it",
        needs=["batch", "kv-disk"],
    )
    def test_order(self, subject: Subject) -> None:
        prompts = [subject.prompt(300, seed=number).tolist() for number in range(3)]
        wanted = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)
        requests = [
            Request(token_ids=prompt, wanted=wanted, priority=priority, keep=False)
            for prompt, priority in zip(prompts, (2, 1, 0), strict=True)
        ]
        kept = subject.new_directory()
        with subject.open(kv="disk", kv_dir=kept, keep_kv=True) as model:
            begun: list[str] = []
            with model.open_scheduler() as scheduler:
                limit_running(scheduler, 1)
                for request in requests:
                    scheduler.add(request)
                while not scheduler.is_idle:
                    for event in scheduler.step():
                        if isinstance(event, NewToken) and event.request_id not in begun:
                            begun.append(event.request_id)
        order = [
            requests.index(one) for name in begun for one in requests if one.request_id == name
        ]
        assert order == [2, 1, 0], f"priorities 2, 1, 0: expected them in turn, got {order}"
        with subject.open(kv="disk", kv_dir=kept, keep_kv=True) as model:
            model(input_ids=torch.tensor(prompts[0])[None], logits_to_keep=1)
            found = model.stats.cached_tokens
        assert not found, f"keep=False: expected nothing to be found again, got {found} tokens"


def _by_the_checkpoint(
    subject: Subject, model: StreamedModel, expected: Expected, draw: random.Random
) -> None:
    """What generation_config.json says holds for any answer, but where a request says otherwise."""
    asked = ruled_requests(subject.vocab_size, draw)
    for name, values in checkpoint_values(subject.vocab_size, draw).items():
        before = getattr(model.generation_config, name)
        for value in values:
            setattr(model.generation_config, name, value)
            ruled = replace(expected, stated={name: value})
            for request, found in zip(asked, model.answer(asked), strict=True):
                ruled.check(request, found)
        setattr(model.generation_config, name, before)


def _repeats(request: Request) -> bool:
    """Whether its answers are the same each time."""
    wanted = request.wanted
    if not isinstance(wanted, SamplingParams):
        return False
    return not wanted.temperature or wanted.seed is not None or wanted.choose is not None


def _seed(request: Request) -> int | None:
    return request.wanted.seed if isinstance(request.wanted, SamplingParams) else None


def _asked_for_more(
    request: Request, answers: dict[str, list[Answered]], vocab_size: int
) -> Request:
    """The same, with options that change nothing of this text: ends that never come, and more that
    is told of each token.
    """
    wanted = request.wanted
    assert isinstance(wanted, SamplingParams), "as what is repeated"
    said = {token for answer in answers[request.request_id] for token in answer.token_ids}
    never = max({*range(5, vocab_size)} - said)
    more = replace(
        wanted, logprobs=1, prompt_logprobs=0, stop=(*wanted.stops, "no such text"),
        stop_token_ids=(*wanted.stop_token_ids, *(() if wanted.min_tokens else (never,))),
    )  # fmt: skip
    return replace(request, wanted=more, priority=1, request_id=f"{request.request_id} again")


def _ended_inside(
    asked: Sequence[Request], answers: dict[str, list[Answered]], words: Words
) -> list[Request]:
    """Two of them that end by a text, two tokens after the first of a draft."""
    found = []
    for request in asked:
        tokens, wanted = answers[request.request_id][0].token_ids, request.wanted
        if len(tokens) > _AHEAD and _repeats(request) and isinstance(wanted, SamplingParams):
            stop = words.of(tokens[_AHEAD - 1], wanted)
            if stop and tokens.index(tokens[_AHEAD - 1]) == _AHEAD - 1:
                name = f"{request.request_id} ended"
                found.append(replace(request, wanted=replace(wanted, stop=stop), request_id=name))
    return found[:2]


def _to_cancel(subject: Subject) -> list[Request]:
    """What would go on for long."""
    wanted = SamplingParams(n=3, temperature=0, max_tokens=60, ignore_eos=True)
    prompts = [subject.prompt(number, seed=number).tolist() for number in (9, 70)]
    return [Request(token_ids=prompt, wanted=wanted) for prompt in prompts]


def _in_any_order(
    scheduler: Scheduler,
    asked: Sequence[Request],
    cancelled: Sequence[Request],
    draw: random.Random,
) -> dict[str, list[Answered]]:
    """The answers by request: some are asked while others decode, and some are cancelled."""
    found: dict[str, list[Answered]] = {}
    coming = draw.sample([*asked, *cancelled], len(asked) + len(cancelled))
    going = {request.request_id: 2 + draw.randrange(4) for request in cancelled}
    ended: set[tuple[str, int]] = set()
    num_steps = 0
    while coming or not scheduler.is_idle:
        num_steps += 1
        assert num_steps < _MOST_STEPS, f"expected all to end, {scheduler.num_running} have not"
        while coming and (scheduler.is_idle or draw.random() < 0.6):
            request = coming.pop()
            wanted = request.wanted
            number = wanted.n if isinstance(wanted, SamplingParams) else 1
            found[request.request_id] = [Answered() for _ in range(number)]
            scheduler.add(request)
        for name in [one for one in going if one in found]:
            going[name] -= 1
            if not going[name]:
                scheduler.cancel(name)
        for event in scheduler.step():
            key = event.request_id, event.index
            assert key not in ended, f"{key[0]}: expected nothing after its last event, got {event}"
            answer = found[event.request_id][event.index]
            if isinstance(event, NewToken):
                gone = going.get(event.request_id, 1) < 1
                assert not gone, f"a request that was cancelled: expected no more, got {event}"
            if answer.add(event):
                ended.add(key)
    for request in cancelled:
        reasons = [answer.finish_reason for answer in found[request.request_id]]
        assert reasons == ["cancelled"] * 3, (
            f"3 answers that were cancelled: expected all to end so, got {reasons}"
        )
    return found


class _KnowsMore:
    """A draft source that knows each answer, and more than that."""

    def __init__(self, asked: Sequence[Request], answers: dict[str, list[Answered]]) -> None:
        self._texts = [
            torch.tensor([*request.token_ids, *answer.token_ids, *answer.token_ids, 5, 5])
            for request in asked
            for answer in answers[request.request_id]
        ]

    def __call__(self, token_ids: Tensor, num_tokens: int) -> Tensor:
        length = len(token_ids)
        known = (text for text in self._texts if torch.equal(text[:length], token_ids))
        return next(known, token_ids)[length : length + num_tokens]
