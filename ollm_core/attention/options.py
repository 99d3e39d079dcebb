"""Options that transformers' layers hand to any attention function."""

from __future__ import annotations

CARRIED = frozenset({"dropout", "position_ids", "use_cache", "is_causal", "output_attentions"})
"""Those that change no result here."""
