"""Questions to a model beside `generate`: many at once, over one reading of what they share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.openmp import openmp_threads_end
from ollm_core.errors import InputError, UnsupportedError
from ollm_core.files.paths import absolute
from ollm_core.generate.opened import OpenedModel
from ollm_core.serving.asking.decisions import decisions
from ollm_core.serving.asking.questions import (
    check_length,
    combining,
    cut_document,
    part_question,
    part_texts,
    question_prompts,
)
from ollm_core.serving.jobs.job import BatchJob, BatchProgress
from ollm_core.serving.jobs.settings import Settings, model_sample
from ollm_core.serving.model import MAX_RUNNING, ServedModel
from ollm_core.serving.offline import Answered, run_all
from ollm_core.serving.openai.requests import Defaults
from ollm_core.serving.request import Choices, Event, Request, SamplingParams, Score
from ollm_core.serving.scheduler import Scheduler
from ollm_core.text.answer_form import Said
from ollm_core.text.generation_config import for_run
from ollm_core.text.prompts import PromptEncoder
from ollm_core.values import PathLike

_SLACK = 16  # tokens that a part may have more beside others than alone

Prompt = str | Sequence[int]
"""A text as it is, or token ids."""


class ServesRequests(OpenedModel):
    """The part of a streamed model that answers requests. To stand before GenerationMixin."""

    tokenizer: Any
    generation_config: GenerationConfig

    @property
    def served(self) -> ServedModel:
        """What a scheduler knows of this model."""
        try:
            self._demand("batch")
        except UnsupportedError:
            max_running = 1
        else:
            max_running = MAX_RUNNING
        positions = getattr(self.config, "max_position_embeddings", None)
        return ServedModel(
            self.engine,
            self.device,
            self.config.vocab_size,
            positions if isinstance(positions, int) else None,
            for_run(self.generation_config),
            self.tokenizer,
            max_running,
            self._drafter,
            self._num_draft_tokens,
        )

    def sequence_bytes(self, num_tokens: int) -> int:
        """What the KV cache of one text of so many tokens takes, if it shares none of it."""
        return KVGeometry(tuple(self._kinds), self.dtype, self.device).sequence_bytes(num_tokens)

    def open_scheduler(self, num_tokens: int = 0, longest: int = 0) -> Scheduler:
        """A scheduler over a new KV store, closed with the model if not before. `num_tokens` to
        expect at once, over all requests, help to choose the tier when it is "auto". Raises
        DoesNotFitError, also where a text of `longest` tokens would not fit when it gets there.
        """
        if not self._close.alive:
            raise InputError("the model is closed", hint="open it again with ollm.load")
        store = self._new_store(num_tokens=num_tokens, at_least=longest)
        scheduler = Scheduler(self.served, store)
        self._belongings.add(weakref.finalize(scheduler, store.close))
        try:
            if longest:
                self.engine.demand_room(store, [longest])
        except BaseException:
            scheduler.close()
            raise
        return scheduler

    @openmp_threads_end()
    def answer(
        self,
        requests: Sequence[Request],
        on_event: Callable[[Event], None] = lambda _: None,
        on_open: Callable[[Scheduler], None] = lambda _: None,
    ) -> list[list[Answered]]:
        """Run requests together to their end; see `ollm_core.serving.offline.run_all`. One alone
        that would not fit in the end is refused before anything is computed. `on_open` is told the
        scheduler before that.
        """
        for request in requests:  # what can never run is told before what does not fit
            self.served.check(request)
        lengths = list(map(_most_tokens, requests))
        longest = lengths[0] if len(requests) == 1 and _has_one_answer(requests[0]) else 0
        with self.open_scheduler(sum(lengths), longest) as scheduler:
            on_open(scheduler)
            return run_all(scheduler, requests, on_event)

    def batch(
        self,
        rows: PathLike,
        output: PathLike,
        errors: PathLike | None = None,
        *,
        max_new_tokens: int = 256,
        anyway: bool = False,
        on_progress: Callable[[BatchProgress], None] = lambda _: None,
    ) -> BatchProgress:
        """Answer the rows of a file of OpenAI's batch lines, as `ollm batch` does: each answer is
        appended to `output` and synced, each row that cannot be answered to `errors` (default:
        OUTPUT.errors.jsonl). After a kill, the same call goes on with exactly the rest.

        `max_new_tokens` holds for rows that say nothing. `anyway` goes on with an output that was
        begun with other settings. Raises InputError for files that cannot be used, and what a pass
        raises; see docs/batch.md.
        """
        if not self._close.alive or self.tokenizer is None:
            raise InputError("batch: need an open model with a tokenizer")
        directory = Path(self.tokenizer.name_or_path)
        settings: Settings = {
            "model": model_sample(directory),
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_new_tokens": max_new_tokens,
        }
        given = None if errors is None else absolute(errors)
        with BatchJob(
            absolute(rows), absolute(output), given, settings=settings, anyway=anyway
        ) as job:
            defaults = Defaults(max_tokens=max_new_tokens)
            return job.run(self, directory.name, defaults, on_progress)

    def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[list[float]]:
        """The log-probability of each token of each continuation after the prompt, [n] each.

        All are computed in one weight pass; in two, the first of which reads the prompt, where
        reading it with each continuation would take longer. Raises InputError.
        """
        before = self.token_ids(prompt)
        if not before:
            raise InputError("score: need a prompt of at least one token, have none")
        requests = []
        for continuation in continuations:
            after = self.token_ids(continuation, special=False)
            if not after:
                raise InputError("score: need a continuation of at least one token, have none")
            requests.append(
                Request(token_ids=[*before, *after], wanted=Score(len(after)), keep=False)
            )
        found = self.answer(requests) if requests else []
        return [list(answer.scored.logprobs) for [answer] in found if answer.scored]

    def ask(
        self,
        document: str,
        questions: Sequence[str],
        sampling: SamplingParams | None = None,
        *,
        system: str | None = None,
        map_reduce: bool = False,
        on_prompts: Callable[[int, int], None] = lambda _, __: None,
        on_kept: Callable[[int], None] = lambda _: None,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> list[Answered]:
        """Answer questions on one document, in their order: it is computed once, and all answers
        are made together. The default is greedy. `on_prompts` is told, before anything is computed,
        the tokens of the longest prompt, and the number of parts that the document is read in; then
        `on_kept`, if it is one, how many tokens of that prompt were read before. `on_event` is told
        what the model writes, its thoughts with the rest; answers have them apart.

        A document past the model's positions raises InputError; with `map_reduce` it is read in
        parts, each question is asked of each, and then of the answers. That is no longer the
        model's answer to the whole document.
        """
        sampling = sampling or SamplingParams(temperature=0)
        encoder = PromptEncoder(self.tokenizer, system)
        prompts = question_prompts(encoder, document, questions)
        positions = self.served.max_positions
        longest = max(map(len, prompts))
        parts: list[str] = []
        if map_reduce and positions is not None and longest + sampling.max_tokens > positions:
            room = positions - sampling.max_tokens - self._around(encoder, questions)
            parts = part_texts(cut_document(document, room, self._num_tokens))
            on_prompts(longest, len(parts))
            prompts = self._reduced(encoder, parts, questions, sampling)
            check_length(prompts, positions)
        else:
            check_length(prompts, positions)
            on_prompts(longest, 1)

        def opened(scheduler: Scheduler) -> None:
            if not parts:
                on_kept(scheduler.num_kept(max(prompts, key=len)))

        return self._answered(encoder, prompts, sampling, on_event, opened)

    def _answered(
        self,
        encoder: PromptEncoder,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        on_event: Callable[[Event], None] = lambda _: None,
        on_open: Callable[[Scheduler], None] = lambda _: None,
    ) -> list[Answered]:
        """One answer to each prompt, and what the model thought of it apart."""
        form = encoder.answer_form(prompts[0])
        requests = _alike(prompts, sampling.showing(form.control_ids(self.tokenizer)))
        found = [answers[0] for answers in self.answer(requests, on_event, on_open)]
        for answer in found:
            said = Said(form)
            said.add(answer.text, last=True)
            answer.text, answer.thoughts = said.text, said.thoughts
        return found

    def _reduced(
        self,
        encoder: PromptEncoder,
        parts: Sequence[str],
        questions: Sequence[str],
        sampling: SamplingParams,
    ) -> list[list[int]]:
        """Ask each question of each part; -> prompts that ask it of the answers."""
        asked = [part_question(question) for question in questions]
        prompts = [one for part in parts for one in question_prompts(encoder, part, asked)]
        found = [answer.text for answer in self._answered(encoder, prompts, sampling)]
        of_each = [found[place :: len(questions)] for place in range(len(questions))]
        return encoder.of_texts(list(map(combining, questions, of_each)))

    def _around(self, encoder: PromptEncoder, questions: Sequence[str]) -> int:
        """Tokens of a prompt beside a part of the document, at most."""
        asked = [part_question(question) for question in questions]
        [beside] = part_texts(["x"])
        return max(map(len, question_prompts(encoder, beside, asked))) + _SLACK

    def _num_tokens(self, text: str) -> int:
        return len(self.token_ids(text, special=False))

    def decide(self, document: str, questions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Answer typed questions on a document with a probability for each allowed answer, by
        name, in the form of transformers' DecisionPipeline: {"type": "noul" | "choice" | "score",
        "instructions": ..., "criteria": ...} each.

        Nothing is decoded: one weight pass reads the document, another all questions; one does it
        where the document is kept or short. Raises InputError, UnsupportedError.
        """
        made = decisions(self.tokenizer, document, questions)
        check_length([one.token_ids for one in made], self.served.max_positions)
        requests = [
            Request(token_ids=one.token_ids, wanted=Choices(one.label_ids), keep=False)
            for one in made
        ]
        found = self.answer(requests)
        return {
            one.question.name: one.answer(answer.scored.logprobs)
            for one, [answer] in zip(made, found, strict=True)
            if answer.scored
        }

    def token_ids(self, prompt: Prompt, *, special: bool = True) -> list[int]:
        """Those of a text, with or without what the tokenizer puts around any; ids as they are.
        Raises InputError.
        """
        if not isinstance(prompt, str):
            return [int(token_id) for token_id in prompt]
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer", hint="give token ids")
        return list(self.tokenizer(prompt, add_special_tokens=special)["input_ids"])


def _alike(prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Request]:
    """Requests whose common beginning is kept, and not each answer."""
    keep = len(prompts) == 1
    return [Request(token_ids=one, wanted=sampling, keep=keep) for one in prompts]


def _most_tokens(request: Request) -> int:
    """That the store has in the end, over all answers; their last tokens need no place."""
    wanted, num_prompt = request.wanted, len(request.token_ids)
    if isinstance(wanted, SamplingParams):
        return wanted.n * (num_prompt + wanted.max_tokens - 1)
    return num_prompt


def _has_one_answer(request: Request) -> bool:
    return not isinstance(request.wanted, SamplingParams) or request.wanted.n == 1
