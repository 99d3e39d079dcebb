"""A tiny model that thinks before it answers, whatever it is asked."""

from __future__ import annotations

from pathlib import Path

from calling_model import make_calling

THOUGHT, ANSWER = "Let me see.", "It is 3."
_TEMPLATE = (
    "{%- for m in messages %}[{{ m.role }}]"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}{% if enable_thinking is false %}[plain]{% endif %}[assistant]"
)
_CHAIN = ["<think>", f"\n{THOUGHT}\n", "</think>", f"\n\n{ANSWER}"]


def make_thinking(directory: Path) -> Path:
    """Between the tags of Qwen 3 and others."""
    return make_calling(directory, _CHAIN, _TEMPLATE)
