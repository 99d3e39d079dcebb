"""Runs requests to their end, one scheduler and no thread: what scripts and jobs use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ollm_core.errors import InputError
from ollm_core.serving.request import (
    Counts,
    Event,
    Failed,
    Finished,
    FinishReason,
    NewToken,
    Request,
    SamplingParams,
    Scored,
    TokenLogprobs,
)
from ollm_core.serving.scheduler import Scheduler


class Steps(Protocol):
    """A scheduler, as far as `run_each` needs one."""

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. Raises InputError for one that can never run."""

    def step(self) -> list[Event]:
        """What has happened next."""


@dataclass(slots=True)
class Answered:
    """One answer to a request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each token, where they were asked for."""
    scored: Scored | None = None
    """What was wanted by Score or Choices."""
    finish_reason: FinishReason | None = None
    counts: Counts = field(default_factory=Counts)
    error: Exception | None = None
    thoughts: str = ""
    """What the model said to itself before, where somebody has taken that apart."""

    def add(self, event: Event) -> bool:
        """Take note of an event; -> whether it is the last one."""
        if isinstance(event, NewToken):
            self.text += event.text
            self.token_ids.append(event.token_id)
            if event.logprobs:
                self.logprobs.append(event.logprobs)
        elif isinstance(event, Scored):
            self.scored = event
        elif isinstance(event, Finished):
            self.text += event.text
            self.finish_reason, self.counts = event.reason, event.counts
            return True
        elif isinstance(event, Failed):
            self.error = event.error
            return True
        return False


def run_each(
    scheduler: Steps,
    requests: Iterable[Request],
    on_event: Callable[[Event], None] = lambda _: None,
    ahead: int | None = None,
    ahead_tokens: int | None = None,
) -> Iterator[tuple[Request, list[Answered]]]:
    """Run `requests`; -> each with its answers when it has ended, in the order of their ends. One
    that can never run ends at once, with that error. Of an iterator no more are taken before others
    have ended than `ahead`, and none once their prompts have `ahead_tokens` (default: all).
    """
    source = iter(requests)
    live: dict[str, tuple[Request, list[Answered], set[int]]] = {}
    more, num_tokens = True, 0
    while more or live:
        while (
            more
            and (ahead is None or len(live) < ahead)
            and (ahead_tokens is None or num_tokens < ahead_tokens)
        ):
            request = next(source, None)
            if request is None:
                more = False
                break
            wanted = request.wanted
            num = wanted.n if isinstance(wanted, SamplingParams) else 1
            try:
                scheduler.add(request)
            except InputError as error:
                yield request, [Answered(error=error) for _ in range(num)]
                continue
            live[request.request_id] = request, [Answered() for _ in range(num)], set(range(num))
            num_tokens += len(request.token_ids)
        for event in scheduler.step() if live else ():
            on_event(event)
            request, answers, still = live[event.request_id]
            if answers[event.index].add(event):
                still.discard(event.index)
            if not still:
                del live[event.request_id]
                num_tokens -= len(request.token_ids)
                yield request, answers


def run_all(
    scheduler: Scheduler,
    requests: Iterable[Request],
    on_event: Callable[[Event], None] = lambda _: None,
) -> list[list[Answered]]:
    """The answers to each request, in the order of the requests. Raises InputError at once if one
    can never run, or else what the first of them that failed, failed by; the others then go on to
    their end before.
    """
    wanted = list(requests)
    for request in wanted:
        scheduler.check(request)
    found = {
        request.request_id: answers for request, answers in run_each(scheduler, wanted, on_event)
    }
    results = [found[request.request_id] for request in wanted]
    for answers in results:
        for answer in answers:
            if answer.error is not None:
                raise answer.error
    return results
