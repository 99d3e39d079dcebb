"""What is told before a long run."""

from __future__ import annotations

import re

from ollm_core.cli.forecast import forecast


def test_a_long_prompt_is_told(smollm2):
    """By the plan: seconds to read it, and of each pass."""
    options = {"device": "cpu", "device_memory": "200MB", "precision": "fast"}
    told = forecast(str(smollm2), options, 7000, 64)
    assert re.fullmatch(
        r"about [\d.]+ (s|min) to read them if nothing is kept, "
        r"[\d.]+ s for each pass that makes tokens(; a guess, .*)?",
        told,
    )


def test_what_is_quick_or_cannot_be_planned_is_not(smollm2, tiny_chat):
    """A tiny model, no room, no model."""
    assert forecast(str(tiny_chat), {"device": "cpu"}, 100, 4) == ""
    assert forecast(str(smollm2), {"device": "cpu", "device_memory": "1MB"}, 7000, 64) == ""
    assert forecast("no-such-id", {"device": "cpu"}, 100, 4) == ""
