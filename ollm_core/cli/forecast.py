"""How long a run will take, told before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollm_core.cli.options import keywords_of
from ollm_core.cli.output import format_time
from ollm_core.errors import OllmError

_WORTH_TELLING = 2.0  # seconds


def forecast(
    model: str, options: Mapping[str, Any], num_prompt_tokens: int, max_new_tokens: int
) -> str:
    """What `ollm plan` expects of one prompt, in a line; empty for what is quick, or cannot be
    planned.
    """
    from ollm_core.options import PlanOptions
    from ollm_core.planning.planner import Planner

    known = keywords_of("plan", options)
    known |= {"context": num_prompt_tokens + max_new_tokens, "max_new_tokens": max_new_tokens}
    try:
        found = Planner(model, PlanOptions(**known)).plan(compare=False)
    except OllmError:
        return ""
    if not found.fits or found.prefill_seconds < _WORTH_TELLING:
        return ""
    token = format_time(1 / found.tokens_per_second)
    rates = (found.rates.disk, found.rates.memory, found.rates.compute)
    assumed = any(rate.source == "assumed" for rate in rates)
    guess = "; a guess, until `ollm doctor` has measured this machine" if assumed else ""
    return (
        f"about {format_time(found.prefill_seconds)} to read them if nothing is kept, "
        f"{token} for each pass that makes tokens{guess}"
    )
