"""The documentation site: Sphinx over the Markdown pages of docs/. `make docs` builds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[2]
HOME = "https://github.com/ollm-core/ollm-core/blob/main"

project = "oLLM-core"
copyright = "the oLLM-core authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
exclude_patterns = ["site"]
source_suffix = {".md": "markdown"}
highlight_language = "none"
smartquotes = False  # --json is no dash
default_role = "code"  # docstrings write `name`

myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "oLLM-core"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"font-stack": "system-ui, sans-serif"},
    "dark_css_variables": {"font-stack": "system-ui, sans-serif"},
}

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
"""Of no image: text, target, anchor."""
_NAMED_BY_FILE = re.compile(r"\[[\w./-]+\.md\]\(([^)\s]+\.md(?:#[^)\s]*)?)\)")
_logger = logging.getLogger(__name__)


def adapt_links(_: Sphinx, page: str, source: list[str]) -> None:
    """Links to files that are no pages lead to the repository; those that show a page's file name
    show its title. One that leads nowhere is a warning, which `make docs` takes for an error.
    """
    here = (ROOT / "docs" / page).parent

    def absolute(match: re.Match[str]) -> str:
        target = (here / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        if not target.exists():
            _logger.warning("%s links to %s, which is not there", page, match[2], location=page)
        return f"[{match[1]}]({HOME}/{target.relative_to(ROOT)}{match[3] or ''})"

    def named(match: re.Match[str]) -> str:
        return match[0] if "://" in match[1] else f"[]({match[1]})"

    source[0] = _NAMED_BY_FILE.sub(named, _LINK.sub(absolute, source[0]))


def as_restructured_text(
    _app: Sphinx, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]
) -> None:
    """Docstrings are plain text with `code`: what is a sign of reStructuredText beside that is
    shown as it is.
    """
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        escaped = [
            part
            if part.startswith("`")
            else re.sub(r"(?<!^)[*|]|(?<=\w)_(?=\W|$)", r"\\\g<0>", part)
            for part in parts
        ]
        lines[i] = "".join(escaped)


def plain_help(_app: Sphinx, _context: Any, lines: list[str]) -> None:
    """The same for the help of an option."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", adapt_links)
    app.connect("autodoc-process-docstring", as_restructured_text)
    app.connect("sphinx-click-process-options", plain_help)
