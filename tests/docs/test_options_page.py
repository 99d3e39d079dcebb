"""docs/generated/options.md is what ollm_core/options.py says now."""

from __future__ import annotations

from pathlib import Path

from options_table import options_page

PAGE = Path(__file__).parents[2] / "docs/generated/options.md"


def test_the_page_is_what_the_options_say():
    """Byte for byte; `make options` writes it again."""
    assert PAGE.read_text() == options_page()
