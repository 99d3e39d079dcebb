"""LLM: a model and what to ask it in the words of vLLM, for scripts that are written for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ollm_core.api import load
from ollm_core.contracts.closing import Closing
from ollm_core.errors import InputError
from ollm_core.serving.offline import Answered
from ollm_core.serving.request import (
    Counts,
    Event,
    Failed,
    Finished,
    FinishReason,
    NewToken,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from ollm_core.serving.scheduler import Scheduler
from ollm_core.text.prompts import PromptEncoder
from ollm_core.text.templates import Message
from ollm_core.values import PathLike

_EXPECTED_TOKENS = 8192
"""Of all conversations that are streamed, to choose where their keys and values are kept."""
Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or vLLM's {"prompt": text} or {"prompt_token_ids": ids}."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer, with vLLM's names."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] | None = None
    """Of each token, where they were asked for."""

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of the whole answer, where they were asked for."""
        return None if self.logprobs is None else sum(one.logprob for one in self.logprobs)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt, with vLLM's names."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    counts: list[Counts] = field(default_factory=list)
    """What each took."""


class LLM(Closing):
    """A model whose prompts are answered together: each weight pass reads the weights once for all
    of them, and a beginning that they share is computed once. A context manager.
    """

    def __init__(self, model: PathLike, **options: Any) -> None:
        """`model` and `options` are those of `ollm.load`."""
        self.model = load(model, **options)
        self._scheduler: Scheduler | None = None
        self._events: dict[str, list[Event]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Go on with each of `prompts`, as they are; one SamplingParams is for all. In the order of
        the prompts. Raises InputError, DoesNotFitError and what a pass raises.
        """
        several = prompts if _is_several(prompts) else [prompts]
        texts = [one if isinstance(one, str) else None for one in map(_plain, several)]
        ids = [self.model.token_ids(_plain(one)) for one in several]
        return self._run(texts, ids, sampling_params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, by the model's chat template. Raises as `generate`
        does.
        """
        several: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        ids = PromptEncoder(self.model.tokenizer).of_chats(several)
        return self._run([None] * len(ids), ids, sampling_params)

    def stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[NewToken | Finished]:
        """Answer one conversation token by token: each event has the `text` that is new, the last
        one also its `reason` and `counts`. What the conversation had before, or another one, is not
        computed again. One that is not read to its end ends where it is; several may be read in
        turns, by one thread. Raises as `generate` does.
        """
        wanted = sampling_params or SamplingParams()
        if wanted.n != 1:
            raise InputError(f"stream: need one answer, have n={wanted.n}")
        [ids] = PromptEncoder(self.model.tokenizer).of_chats([messages])
        if self._scheduler is None:
            self._scheduler = self.model.open_scheduler(_EXPECTED_TOKENS)
        scheduler, request = self._scheduler, Request(token_ids=ids, wanted=wanted)
        waiting = self._events[request.request_id] = []
        scheduler.add(request)
        try:
            while True:
                while not waiting:
                    if scheduler.is_idle:
                        raise InputError("stream: the model is closed")
                    for event in scheduler.step():
                        self._events.get(event.request_id, []).append(event)
                event = waiting.pop(0)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, NewToken | Finished):
                    yield event
                if isinstance(event, Finished):
                    return
        finally:
            scheduler.cancel(request.request_id)
            del self._events[request.request_id]

    def close(self) -> None:
        """See `ollm.load`."""
        if self._scheduler is not None:
            self._scheduler.close()
        self.model.close()

    def _run(
        self,
        texts: Sequence[str | None],
        ids: Sequence[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(ids)
        if len(sampling) != len(ids):
            raise InputError(
                f"sampling_params: need one, or one for each of {len(ids)} prompts, "
                f"have {len(sampling)}"
            )
        requests = [
            Request(token_ids=one, wanted=wanted) for one, wanted in zip(ids, sampling, strict=True)
        ]
        answers = self.model.answer(requests) if requests else []
        return [
            RequestOutput(
                text,
                one,
                [_output(i, answer) for i, answer in enumerate(found)],
                [answer.counts for answer in found],
            )
            for text, one, found in zip(texts, ids, answers, strict=True)
        ]


def _output(index: int, answer: Answered) -> CompletionOutput:
    logprobs = answer.logprobs or None
    return CompletionOutput(index, answer.text, answer.token_ids, answer.finish_reason, logprobs)


def _is_several(prompts: Any) -> bool:
    if isinstance(prompts, str | Mapping):
        return False
    return not prompts or not isinstance(prompts[0], int)


def _plain(prompt: Any) -> Any:
    """A text or token ids."""
    if not isinstance(prompt, Mapping):
        return prompt
    found = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if found is None:
        raise InputError('a prompt needs "prompt" or "prompt_token_ids"')
    return found
