"""How long a run will take, told before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ollm_core.cli.options import keywords_of
from ollm_core.cli.output import format_time
from ollm_core.errors import OllmError

if TYPE_CHECKING:
    from ollm_core.server.forecast import Forecast, Forecasts

_WORTH_TELLING = 2.0  # seconds


def forecasts_of(model: str, options: Mapping[str, Any]) -> Forecasts:
    """Of prompts of any length; none where the model cannot be planned."""
    from ollm_core.server.forecast import Forecasts, make_forecasts

    try:
        positions, plan = _planned(model, options, max_new_tokens=1)
    except OllmError:
        return Forecasts()
    return make_forecasts(positions - 1, plan)


def forecast(
    model: str,
    options: Mapping[str, Any],
    num_prompt_tokens: int,
    max_new_tokens: int,
    num_kept: int = 0,
) -> str:
    """What `ollm plan` expects of one prompt whose first `num_kept` tokens were read before, in a
    line; empty for what is quick, or cannot be planned.
    """
    from ollm_core.server.forecast import Forecasts

    try:
        _, plan = _planned(model, options, max_new_tokens)
    except OllmError:
        return ""
    planned = [plan(length) for length in (num_kept, num_prompt_tokens) if length]
    expected = Forecasts([one for one in planned if one]).of(num_prompt_tokens, num_kept)
    if expected is None or not expected.fits or expected.seconds < _WORTH_TELLING:
        return ""
    guess = "; a guess, until `ollm doctor` has measured this machine" if expected.is_guess else ""
    left = f"the {num_prompt_tokens - num_kept:,} that are not kept" if num_kept else "them"
    return (
        f"about {format_time(expected.seconds)} to read {left}, "
        f"{format_time(expected.pass_seconds)} for each pass that makes tokens{guess}"
    )


def _planned(
    model: str, options: Mapping[str, Any], max_new_tokens: int
) -> tuple[int, Callable[[int], Forecast | None]]:
    """The model's positions, and what plans a prompt of so many tokens before `max_new_tokens`.
    Raises OllmError.
    """
    from dataclasses import replace

    from ollm_core.options import PlanOptions
    from ollm_core.planning.planner import Planner
    from ollm_core.server.forecast import Forecast

    known = {**keywords_of("plan", options), "max_new_tokens": max_new_tokens}
    planner = Planner(model, PlanOptions(**known))

    def plan(num_tokens: int) -> Forecast | None:
        wanted = replace(planner.options, context=num_tokens + max_new_tokens)
        try:
            found = planner.plan(wanted, compare=False)
        except OllmError:
            return None
        rates = (found.rates.disk, found.rates.memory, found.rates.compute)
        assumed = any(rate.source == "assumed" for rate in rates)
        disk = 0.0 if found.rates.disk.source == "assumed" else found.rates.disk.per_second
        token = 1 / found.tokens_per_second if found.fits else 0.0
        return Forecast(num_tokens, found.prefill_seconds, found.fits, token, assumed, disk)

    return planner.positions, plan
