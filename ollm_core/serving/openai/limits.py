"""How much a body may ask for."""

from __future__ import annotations

from collections.abc import Mapping

MAX_ID_CHARS = 512
MAX_SHORT_CHARS = 512
"""Of names and ids in messages."""
MAX_ANSWERS = 128
"""To a prompt."""
MAX_TEXTS = 256
"""Answers to all prompts of a body."""
MAX_LOGPROBS = 20
MAX_TOOLS = 128
TOOL_NAME = "[A-Za-z0-9_.-]{1,64}"
WORD = "[A-Za-z0-9_-]{1,32}"
"""What may be said to a chat template beside messages."""
LATER = 10
"""The priority of what may wait: it comes after all else."""
TIERS: Mapping[str, int] = {
    "auto": 0, "default": 0, "standard": 0, "standard_only": 0, "priority": 0, "flex": LATER,
}  # fmt: skip
"""Priorities by the words for them."""
