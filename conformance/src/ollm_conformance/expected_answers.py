"""What may be answered to a request, by transformers' model: tokens, log-probabilities, text, and
where it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ollm_conformance.compare import same_within
from ollm_conformance.subject import Reference
from ollm_conformance.wishes import Words
from ollm_core.testing import Answered, Request, SamplingParams, Score

_NEAR = 1e-3
"""Of the scale of the logits: rows that share a call have other last bits."""
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Expected:
    """What may come of requests to a model that ends a text with one of `ends`."""

    reference: Reference
    words: Words
    ends: tuple[int, ...]
    stated: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint's generation config says of any answer."""

    def check(self, request: Request, answers: list[Answered]) -> None:
        """Raises AssertionError unless these may be the answers."""
        what = f"after {len(request.token_ids)} tokens, {told(request)}"
        if self.stated:
            what += f", {' and '.join(self.stated)} in generation_config.json"
        wanted = request.wanted
        for answer in answers:
            assert answer.error is None, f"{what}: expected an answer, got {answer.error!r}"
            counted = answer.counts.num_prompt_tokens, answer.counts.num_new_tokens
            wants = len(request.token_ids), len(answer.token_ids)
            assert counted == wants, f"{what}: expected counts {wants}, got {counted}"
        if isinstance(wanted, SamplingParams):
            for index, answer in enumerate(answers):
                self._check_answer(request, wanted, answer, f"{what}, answer {index}")
            if wanted.prompt_logprobs is not None:
                self._check_scored(
                    request, answers[0], 0, wanted.prompt_logprobs, f"{what}: prompt_logprobs"
                )
        elif isinstance(wanted, Score):
            first = len(request.token_ids) - wanted.num_tokens - 1
            self._check_scored(request, answers[0], first, wanted.top, what)
        else:
            last = self.reference.run(torch.tensor(request.token_ids), last_only=True)
            true = last[0].log_softmax(-1)[list(wanted.token_ids)]
            assert answers[0].scored is not None, f"{what}: expected choices, got none"
            found = torch.tensor(answers[0].scored.logprobs)
            same_within(found, true, _TOLERANCE, f"{what}: log-probabilities of choices")

    def _check_scored(
        self, request: Request, answer: Answered, first: int, top: int, what: str
    ) -> None:
        """The log-probabilities of the prompt's tokens after number `first`."""
        ids = torch.tensor(request.token_ids)
        true = self.reference.run(ids)[first:-1].log_softmax(-1)
        assert answer.scored is not None, f"{what}: expected log-probabilities, got none"
        number = len(answer.scored.logprobs)
        assert number == len(true), f"{what}: expected {len(true)} of them, got {number}"
        if not number:
            return
        of_each = true.gather(1, ids[first + 1 :, None])[:, 0]
        same_within(torch.tensor(answer.scored.logprobs), of_each, _TOLERANCE, what)
        likeliest = [[value for _, value in one] for one in answer.scored.top]
        best = true.topk(min(top, true.shape[1])).values
        if top:
            same_within(torch.tensor(likeliest), best, _TOLERANCE, f"{what}: likeliest")

    def _check_answer(
        self, request: Request, wanted: SamplingParams, answer: Answered, what: str
    ) -> None:
        """Each token against what transformers computes and allows there; and text and end."""
        tokens = answer.token_ids
        prompt = torch.tensor(request.token_ids)
        text = torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])
        logits = self.reference.run(text)[len(prompt) - 1 : len(text) - 1]
        own = () if wanted.ignore_eos else self.ends
        late = sorted({*own, *wanted.stop_token_ids})  # which min_tokens keeps from coming
        make: Any = self.reference.model._get_logits_processor
        samples = wanted.temperature > 0 and wanted.choose is None
        plain, whole = (
            make(
                _as_transformers_has_it(wanted, late, self.stated, samples=chance),
                len(prompt), None, None, LogitsProcessorList(wanted.logits_processors),
            )
            for chance in (False, samples)
        )  # fmt: skip
        for place, (token, row) in enumerate(zip(tokens, logits, strict=True)):
            here, ids = f"{what}: token {place}", text[None, : len(prompt) + place]
            scores = plain(ids, row[None].clone())[0]
            finite = scores[scores > -torch.inf]
            slack = _NEAR * float(finite.abs().max())
            if wanted.choose is not None:
                least = float(scores[wanted.choose(ids[0].tolist(), scores)])
                near = abs(float(scores[token]) - least) <= slack
                assert near, f"{here}: expected the token of `choose`, got {token}"
            else:
                allowed = scores[whole(ids, row[None].clone())[0] > -torch.inf]
                least = float(allowed.min() if samples else allowed.max())
                assert float(scores[token]) >= least - slack, (
                    f"{here}: expected a token that is allowed there, got {token} with a score of "
                    f"{float(scores[token]):.4g}, where {least:.4g} is the least"
                )
            self._check_logprobs(wanted, answer, place, row, f"{here}: logprobs")
        number = len(tokens) if wanted.logprobs is not None else 0
        got = len(answer.logprobs)
        assert got == number, f"{what}: expected logprobs of {number} tokens, got {got}"
        self._check_end(wanted, answer, own, what)

    @staticmethod
    def _check_logprobs(
        wanted: SamplingParams, answer: Answered, place: int, row: Tensor, what: str
    ) -> None:
        if wanted.logprobs is None:
            return
        found, true = answer.logprobs[place], row.log_softmax(-1)
        values = torch.tensor([found.logprob, *(value for _, value in found.top)])
        best = true.topk(min(wanted.logprobs, len(true))).values
        own = true[answer.token_ids[place]][None]
        same_within(values, torch.cat([own, best]), _TOLERANCE, what)

    def _check_end(
        self, wanted: SamplingParams, answer: Answered, own: tuple[int, ...], what: str
    ) -> None:
        ends = {*wanted.stop_token_ids, *own}
        text, reason, length = "", "length", wanted.max_tokens
        for number, token in enumerate(answer.token_ids, start=1):
            text += self.words.of(token, wanted)
            places = sorted((text.find(stop), stop) for stop in wanted.stops if stop in text)
            if places:
                at, stop = places[0]
                text = text[: at + len(stop) * wanted.include_stop_str_in_output]
            if (places or token in ends) and number >= wanted.min_tokens:
                reason, length = "stop", number
                break
        found = answer.finish_reason, len(answer.token_ids)
        assert found == (reason, length), (
            f"{what}: expected an end by {reason} after {length} tokens, got {found[0]} after "
            f"{found[1]}"
        )
        assert answer.text == text, f"{what}: expected the text {text!r}, got {answer.text!r}"


def told(request: Request) -> str:
    """What a request asks, as far as it is not the usual."""
    wanted = request.wanted
    if not isinstance(wanted, SamplingParams):
        return type(wanted).__name__.lower()
    usual = SamplingParams()
    values = {one.name: getattr(wanted, one.name) for one in fields(wanted)}
    values["stop_token_ids"] = f"{len(wanted.stop_token_ids)} of them"
    if not wanted.stop_token_ids:
        del values["stop_token_ids"]
    kept = (f"{k} = {v!r}" for k, v in values.items() if v != getattr(usual, k))
    return f"by {', '.join(kept)}"


def _as_transformers_has_it(
    wanted: SamplingParams, ends: list[int], stated: Mapping[str, Any], *, samples: bool
) -> GenerationConfig:
    """The same options, before what is `stated`; those of sampling if it `samples`."""
    rules = dict(stated)
    if wanted.repetition_penalty != 1.0:
        rules["repetition_penalty"] = wanted.repetition_penalty
    chance: dict[str, Any] = {
        "temperature": wanted.temperature,
        "top_k": max(wanted.top_k, 0),
        "top_p": wanted.top_p,
        "min_p": wanted.min_p or None,
    }
    config = GenerationConfig(
        do_sample=samples,
        **(chance if samples else {}),
        **rules,
        min_new_tokens=wanted.min_tokens or None,
        eos_token_id=ends or None,
    )
    config._eos_token_tensor = torch.tensor(ends) if ends else None
    return config
