"""Checks of answers that are made in any way: options of requests, dealt at random."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import same_tokens, same_within
from ollm_conformance.seeds import run_seed
from ollm_conformance.subject import Subject
from ollm_core.testing import (
    Answered,
    NewToken,
    Request,
    SamplingParams,
    StreamedModel,
    limit_running,
)

_NUM = 10
_NEAR = 1e-3
"""Of the scale of the logits: rows that share a call have other last bits."""


class Sampled(AdapterSuite):
    """Options of requests."""

    @check(
        "serving.sampling",
        "Whatever options requests have that run together, each token is one that transformers' "
        "own processors allow, a greedy one the most likely of them, log-probabilities are the "
        "model's own, texts end where they should, and a seed says the same again beside others.",
        look="core chooses tokens: an adapter has no part in it; run exact.decode first",
        needs=["batch"],
    )
    def test_sampling(self, subject: Subject) -> None:
        draw = random.Random(run_seed())
        with subject.open() as model:
            model.generation_config.eos_token_id = [*range(6, subject.vocab_size, 4)]  # often said
            requests = [_drawn(subject, draw, number) for number in range(_NUM)]
            answers = [one for [one] in model.answer(requests)]
            for request, answer in zip(requests, answers, strict=True):
                _check_answer(subject, model, request, answer)
            # The same again, beside fewer, in another order, and with an end that never comes.
            seeded = [number for number in range(_NUM) if number % 2]
            again = []
            for number in reversed(seeded):
                wanted = _wanted(requests[number])
                never = {*range(5, subject.vocab_size)} - {*answers[number].token_ids}
                if not wanted.min_tokens:  # which leaves ends out
                    wanted = replace(wanted, stop_token_ids=[*wanted.stop_token_ids, min(never)])
                again.append(replace(requests[number], wanted=wanted, request_id=f"again {number}"))
            repeated = [one for [one] in model.answer(again)]
        for number, one in zip(reversed(seeded), repeated, strict=True):
            what = f"tokens by {_told(_wanted(requests[number]))}, said again beside others"
            same_tokens(one.token_ids, answers[number].token_ids, what)

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


def _drawn(subject: Subject, draw: random.Random, number: int) -> Request:
    """One of each two samples."""
    length = draw.choice([1, 30, 100, 130])
    ends = [draw.randrange(5, subject.vocab_size) for _ in range(draw.choice([0, 1, 40]))]
    options: dict[str, Any] = {
        "temperature": 0,
        "repetition_penalty": draw.choice([1.0, 1.3]),
        "max_tokens": draw.choice([6, 9]),
        "min_tokens": draw.choice([0, 4]),
        "stop_token_ids": ends,
        "ignore_eos": draw.random() < 0.3,
        "logprobs": draw.choice([None, 0, 3]),
    }
    if number % 2:
        options |= {
            "temperature": draw.choice([0.6, 1.0, 2.5]),
            "top_k": draw.choice([0, 3]),
            "top_p": draw.choice([1.0, 0.5]),
            "min_p": draw.choice([0.0, 0.2]),
            "seed": draw.randrange(1000),
        }
    prompt = subject.prompt(length, seed=number).tolist()
    return Request(token_ids=prompt, wanted=SamplingParams(**options), keep=False)


def _wanted(request: Request) -> SamplingParams:
    assert isinstance(request.wanted, SamplingParams), "as it was drawn"
    return request.wanted


def _told(wanted: SamplingParams) -> str:
    """The options that differ from the usual ones."""
    usual = SamplingParams()
    told = {name: getattr(wanted, name) for name in vars(usual)}
    told["stop_token_ids"] = (
        f"{len(wanted.stop_token_ids)} of them" if wanted.stop_token_ids else ()
    )
    kept = (f"{k} = {v}" for k, v in told.items() if v != getattr(usual, k))
    return ", ".join(kept)


def _check_answer(
    subject: Subject, model: StreamedModel, request: Request, answer: Answered
) -> None:
    """Each token against what transformers computes and allows there, and where the text ends."""
    wanted, tokens = _wanted(request), answer.token_ids
    what = f"after {len(request.token_ids)} tokens by {_told(wanted)}"
    prompt = torch.tensor(request.token_ids)
    text = torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])
    reference = subject.reference()
    logits = reference.run(text)[len(prompt) - 1 : len(text) - 1]
    own = () if wanted.ignore_eos else model.served.end_ids  # which min_tokens keeps from coming
    ends = {*wanted.stop_token_ids, *own}
    make: Any = reference.model._get_logits_processor
    plain, whole = (
        make(
            _as_transformers_has_it(wanted, sorted(own), samples=samples), len(prompt), None, None,
            LogitsProcessorList(),
        )
        for samples in (False, wanted.temperature > 0)
    )  # fmt: skip
    slack = _NEAR * float(logits.abs().max())
    for place, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        here, ids = f"{what}: token {place}", text[None, : len(prompt) + place]
        scores = plain(ids, row[None].clone())[0]
        allowed = scores[whole(ids, row[None].clone())[0] > -torch.inf]
        least = float(allowed.min() if wanted.temperature else allowed.max())
        assert float(scores[token]) >= least - slack, (
            f"{here}: expected a token that is allowed there, got {token} with a score of "
            f"{float(scores[token]):.4g}, where {least:.4g} is the least"
        )
        if wanted.logprobs is not None:
            told, true = answer.logprobs[place], row.log_softmax(-1)
            found = torch.tensor([told.logprob, *(value for _, value in told.top)])
            best = true.topk(wanted.logprobs).values
            same_within(found, torch.cat([true[token][None], best]), 1e-4, f"{here}: logprobs")
    ended = [n for n, token in enumerate(tokens, 1) if token in ends and n >= wanted.min_tokens]
    reason, length = ("stop", ended[0]) if ended else ("length", wanted.max_tokens)
    assert (answer.finish_reason, len(tokens)) == (reason, length), (
        f"{what}: expected an end by {reason} after {length} tokens, got {answer.finish_reason} "
        f"after {len(tokens)}"
    )


def _as_transformers_has_it(
    wanted: SamplingParams, ends: list[int], *, samples: bool
) -> GenerationConfig:
    """The same options; those of sampling if it `samples`."""
    config = GenerationConfig(
        do_sample=samples,
        temperature=wanted.temperature or 1.0,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        min_p=wanted.min_p or None,
        repetition_penalty=wanted.repetition_penalty,
        min_new_tokens=wanted.min_tokens or None,
        eos_token_id=ends or None,
    )
    config._eos_token_tensor = torch.tensor(ends) if ends else None
    return config
