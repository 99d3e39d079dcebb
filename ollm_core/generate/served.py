"""Questions to a model beside `generate`: many at once, over one reading of what they share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ollm_core.errors import InputError, UnsupportedError
from ollm_core.files.paths import absolute
from ollm_core.generate.opened import OpenedModel
from ollm_core.serving.job_settings import Settings, model_sample
from ollm_core.serving.jobs import BatchJob, BatchProgress
from ollm_core.serving.model import MAX_RUNNING, ServedModel
from ollm_core.serving.offline import Answered, run_all
from ollm_core.serving.openai import Defaults
from ollm_core.serving.request import Event, Request, SamplingParams, Score
from ollm_core.serving.scheduler import Scheduler
from ollm_core.text.generation_config import for_run
from ollm_core.values import PathLike

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
        )

    def open_scheduler(self, num_tokens: int = 0) -> Scheduler:
        """A scheduler over a new KV store; `num_tokens` to expect at once, over all requests, help
        to choose the tier when it is "auto". Closed with the
        model, if not before. Raises DoesNotFitError.
        """
        if not self._close.alive:
            raise InputError("the model is closed", hint="open it again with ollm.load")
        store = self._new_store(num_tokens=num_tokens)
        scheduler = Scheduler(self.served, store)
        self._belongings.add(weakref.finalize(scheduler, store.close))
        return scheduler

    def answer(
        self, requests: Sequence[Request], on_event: Callable[[Event], None] = lambda _: None
    ) -> list[list[Answered]]:
        """Run requests together to their end; see `ollm_core.serving.offline.run_all`."""
        with self.open_scheduler(sum(map(_most_tokens, requests))) as scheduler:
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

    def token_ids(self, prompt: Prompt, *, special: bool = True) -> list[int]:
        """Those of a text, with or without what the tokenizer puts around any; ids as they are.
        Raises InputError.
        """
        if not isinstance(prompt, str):
            return [int(token_id) for token_id in prompt]
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer", hint="give token ids")
        return list(self.tokenizer(prompt, add_special_tokens=special)["input_ids"])


def _most_tokens(request: Request) -> int:
    wanted, num_prompt = request.wanted, len(request.token_ids)
    if isinstance(wanted, SamplingParams):
        return wanted.n * (num_prompt + wanted.max_tokens)
    return num_prompt
