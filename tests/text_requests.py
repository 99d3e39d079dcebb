"""Requests for texts whose tokens do not depend on chance, and what a scheduler makes of them."""

from __future__ import annotations

from typing import Any

from ollm_core.serving.request import NewToken, Request, SamplingParams


def greedy(prompt: list[int], num_new: int = 8, **more: Any) -> Request:
    """A request for greedy tokens, whatever they are."""
    names = {"priority", "keep", "request_id"}
    sampling = {name: value for name, value in more.items() if name not in names}
    return Request(
        token_ids=prompt,
        wanted=SamplingParams(
            temperature=0, max_tokens=num_new, **{"ignore_eos": True, **sampling}
        ),
        **{name: value for name, value in more.items() if name in names},
    )


def finish(scheduler):
    """All events until nothing is left to do."""
    events = []
    while not scheduler.is_idle:
        events += scheduler.step()
    return events


def tokens(events, request):
    """The tokens that a request was given."""
    return [
        event.token_id
        for event in events
        if isinstance(event, NewToken) and event.request_id == request.request_id
    ]
