"""Checks of requests that run together: texts join and leave between passes."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_tokens, same_within
from ollm_conformance.subject import Subject
from ollm_core.testing import (
    Choices,
    Finished,
    NewToken,
    Request,
    SamplingParams,
    Scheduler,
    Score,
    StreamedModel,
    limit_running,
)

_LOOK = "caches() and the layers: what a row remembers is its own, whoever is beside it"
_MANY = (70, 82)
_MOST_STEPS = 1000
_TIERS = pytest.mark.parametrize("kv", ["device", "disk"])


class Serving(AdapterSuite):
    """Requests over one model give what each gives alone."""

    @check(
        "serving.joins",
        "Texts that begin alike, join while others decode, and leave before them get the greedy "
        "tokens that each gets alone, and sampled ones those of their seed; one that goes on from "
        "an earlier one, too.",
        look=_LOOK,
        needs=["batch"],
    )
    @_TIERS
    def test_joins(self, subject: Subject, kv: str) -> None:
        document = subject.prompt(200)
        prompts = [
            torch.cat([document, subject.prompt(n, seed=n)]).tolist() for n in (3, 70, 12)
        ] + [subject.prompt(n, seed=n).tolist() for n in (150, 1)]
        lengths, sampled = (12, 3, 7, 5, 9), _request(document.tolist(), 6, seed=5)
        with subject.open(kv=kv) as model:
            [[alone]] = model.answer([sampled])
            requests = list(map(_request, prompts, lengths))
            with model.open_scheduler() as scheduler:
                found: dict[str, list[int]] = defaultdict(list)
                for request in (*requests, _request(document.tolist(), 6, seed=5)):
                    scheduler.add(request)
                    for _ in range(2):
                        _note(scheduler, found)
                _finish(scheduler, found)
                later = [*prompts[0], *found[requests[0].request_id], *prompts[3][:9]]
                again = _request(later, 4)
                scheduler.add(again)
                _finish(scheduler, found)
        for prompt, request in zip((*prompts, later), (*requests, again), strict=True):
            tokens = found[request.request_id]
            expected = subject.reference().greedy(torch.tensor(prompt), len(tokens))[0]
            assert tokens, f"{len(prompt)} tokens: expected an answer, got none"
            same_tokens(tokens, expected, f"tokens after {len(prompt)}, beside others")
        [last] = [tokens for name, tokens in found.items() if name not in _names(requests, again)]
        same_tokens(last, alone.token_ids, "tokens sampled by a seed, beside others")

    @check(
        "serving.cancel",
        "A request that is cancelled while it reads, decodes or waits gets no more tokens and "
        "gives back what it held; the others get the tokens that each gets alone.",
        look=_LOOK,
        needs=["batch"],
    )
    @_TIERS
    def test_cancel(self, subject: Subject, kv: str) -> None:
        prompts = [subject.prompt(n, seed=n).tolist() for n in (90, 40, 65)]
        with subject.open(kv=kv) as model, model.open_scheduler() as scheduler:
            held = _held(model)
            for moment in range(4):
                stays, goes, waits = (_request(prompt, 8, keep=False) for prompt in prompts)
                found: dict[str, list[int]] = defaultdict(list)
                scheduler.add(stays)
                scheduler.add(goes)
                for _ in range(moment):
                    _note(scheduler, found)
                before = len(found[goes.request_id])
                scheduler.add(waits)
                scheduler.cancel(goes.request_id)
                scheduler.cancel(waits.request_id)
                ends = _finish(scheduler, found)
                what = f"cancelled after {moment} passes"
                reasons = {end.request_id: end.reason for end in ends}
                for one in (goes, waits):
                    got = reasons.get(one.request_id)
                    assert got == "cancelled", f"{what}: expected the end 'cancelled', got {got!r}"
                number = len(found[goes.request_id])
                assert number == before, f"{what}: expected {before} tokens, got {number}"
                expected = subject.reference().greedy(torch.tensor(prompts[0]), 8)[0]
                same_tokens(found[stays.request_id], expected, f"tokens beside one {what}")
                now = _held(model)
                assert now <= held, (
                    f"{what}, and all others ended: expected {held} bytes of KV and states, "
                    f"got {now}"
                )

    @check(
        "serving.bounded",
        "However many requests were answered, what is kept of them for others takes no more "
        "memory than after the first seventy.",
        look=_LOOK,
        needs=["batch"],
    )
    def test_bounded(self, subject: Subject) -> None:
        held = []
        with subject.open() as model, model.open_scheduler() as scheduler:
            limit_running(scheduler, 6)
            for first, end in pairwise((0, *_MANY)):
                for number in range(first, end):
                    prompt = subject.prompt(2, seed=number)
                    scheduler.add(_request(prompt.tolist(), 1))
                _finish(scheduler, defaultdict(list))
                held.append(_held(model))
        assert held[1] <= held[0], (
            f"after {_MANY[0]} requests {held[0]} bytes of KV and states were held: expected as "
            f"many after {_MANY[1]}, got {held[1]}"
        )

    @check(
        "serving.score",
        "The score of a continuation is the log-probability of each of its tokens in a forward "
        "pass over the whole text, however many are scored together, with the likeliest tokens "
        "there; choices are as likely as among all tokens; answers to one prompt differ.",
        look=_LOOK,
        needs=["batch"],
    )
    def test_score(self, subject: Subject) -> None:
        prompt = subject.prompt(130)
        continuations = [subject.prompt(n, seed=n) for n in (1, 40, 300, 7)]
        texts = [torch.cat([prompt, continuation]) for continuation in continuations]
        choices = tuple(range(7, subject.vocab_size, 5))
        several = SamplingParams(n=3, max_tokens=8, ignore_eos=True, temperature=2.0, seed=3)
        with subject.open() as model:
            found = model.score(prompt.tolist(), [one.tolist() for one in continuations])
            scores = [
                Request(token_ids=text.tolist(), wanted=Score(len(one), top=3), keep=False)
                for text, one in zip(texts, continuations, strict=True)
            ]
            chosen = Request(token_ids=prompt.tolist(), wanted=Choices(choices), keep=False)
            sampled = Request(token_ids=prompt.tolist(), wanted=several, keep=False)
            *told, [choice], answers = model.answer([*scores, chosen, sampled])
        for text, continuation, logprobs, [score] in zip(
            texts, continuations, found, told, strict=True
        ):
            logits = subject.reference().run(text)[len(prompt) - 1 : -1]
            true = logits.log_softmax(-1)
            expected = true.gather(1, continuation[:, None])[:, 0]
            what = f"log-probabilities of {len(continuation)} tokens after {len(prompt)}"
            same_within(torch.tensor(logprobs), expected, 1e-4, what)
            assert score.scored is not None, f"{what}: expected a score, got none"
            likeliest = [[value for _, value in top] for top in score.scored.top]
            same_within(torch.tensor(likeliest), true.topk(3).values, 1e-4, f"{what}: likeliest")
        assert choice.scored is not None, "choices: expected a score, got none"
        last = subject.reference().run(prompt, last_only=True)[0].log_softmax(-1)
        same_within(
            torch.tensor(choice.scored.logprobs), last[list(choices)], 1e-4,
            f"log-probabilities of {len(choices)} choices",
        )  # fmt: skip
        number = len({tuple(answer.token_ids) for answer in answers})
        assert number == 3, f"3 answers to one prompt: expected others, got {number}"


def _request(
    prompt: list[int], num_new: int, *, seed: int | None = None, keep: bool = True
) -> Request:
    """Greedy without a seed."""
    sampling = SamplingParams(
        max_tokens=num_new, ignore_eos=True, seed=seed, temperature=0 if seed is None else 0.9
    )
    return Request(token_ids=prompt, wanted=sampling, keep=keep)


def _names(requests: list[Request], *more: Request) -> set[str]:
    return {request.request_id for request in (*requests, *more)}


def _note(scheduler: Scheduler, tokens: dict[str, list[int]]) -> list[Finished]:
    """Take one step: new tokens are noted by request; -> what has ended. Raises what a request
    failed by.
    """
    ends = []
    for event in scheduler.step():
        if isinstance(event, NewToken):
            tokens[event.request_id].append(event.token_id)
        elif isinstance(event, Finished):
            ends.append(event)
        elif error := getattr(event, "error", None):
            raise error
    return ends


def _finish(scheduler: Scheduler, tokens: dict[str, list[int]]) -> list[Finished]:
    """Take steps until nothing is left to do, as `_note` does."""
    ends: list[Finished] = []
    for _ in range(_MOST_STEPS):
        if scheduler.is_idle:
            return ends
        ends += _note(scheduler, tokens)
    raise AssertionError(f"expected all to end, {scheduler.num_running} have not")


def _held(model: StreamedModel) -> int:
    """Bytes of the KV cache and of states in both memories."""
    return sum(
        num_bytes
        for account in (model.accounts.device, model.accounts.host)
        for kind, num_bytes in account.kinds.items()
        if kind.startswith("kv ") or kind == "recurrent states"
    )
