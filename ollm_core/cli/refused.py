"""Hints for a run that does not fit: the limits that would be enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollm_core.cli.options import keywords_of
from ollm_core.errors import OllmError


def what_would_do(
    model: str, options: Mapping[str, Any], num_prompt_tokens: int, max_new_tokens: int
) -> str:
    """The smallest memory for the whole run, and the largest context in the memory that there is,
    as `ollm plan` finds them. Empty if the plan knows of nothing, as with a plugin's parts.
    """
    from ollm_core.planning.planner import plan

    try:
        found = plan(
            model,
            context=num_prompt_tokens + max_new_tokens,
            max_new_tokens=max_new_tokens,
            **keywords_of("plan", options),
        )
    except OllmError:
        return ""
    return f"the prompt has {num_prompt_tokens} tokens: {found.hint}" if not found.fits else ""
