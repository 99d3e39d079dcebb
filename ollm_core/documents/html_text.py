"""HTML as text. Scripts and style sheets are left out; nothing is fetched and nothing runs."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from html.parser import HTMLParser

from ollm_core.documents.extracted import Extracted, Lines, Refused
from ollm_core.documents.kinds import decoded

_SKIPPED = {"script", "style", "template"}
_BREAKS = {
    *("address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details"),
    *("dialog", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1"),
    *("h2", "h3", "h4", "h5", "h6", "head", "header", "hr", "html", "legend", "li", "main", "nav"),
    *("ol", "optgroup", "option", "p", "pre", "section", "summary", "table", "tbody", "tfoot"),
    *("thead", "title", "tr", "ul"),
}
"""Elements that begin and end a line."""
_CELLS = {"td", "th"}
_CHARSET = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?([\w.:-]{1,40})|<\?xml[^>]{0,200}encoding=["']([\w.-]{1,40})""",
    re.IGNORECASE,
)
_CHARSET_WITHIN = 4096
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LATIN = {"iso8859-1", "ascii"}
"""What browsers read as Windows' superset of it."""


def extract(data: bytes) -> Extracted:
    """The text of a page. Headings begin with `#`, items with `-`; cells of a row are on one line.
    Raises Refused.
    """
    parser = _Text()
    parser.feed(_source(data))
    parser.close()
    return Extracted(parser.text())


def _source(data: bytes) -> str:
    found = _CHARSET.search(data[:_CHARSET_WITHIN])
    if found is None or data.startswith(
        (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    ):
        return decoded(data)
    declared = (found[1] or found[2]).decode("ascii")
    try:
        name = codecs.lookup(declared).name
        if name.startswith(("utf-16", "utf-32")):  # a page that could say so in ASCII is neither
            return decoded(data)
        return data.decode("cp1252" if name in _LATIN else name)
    except LookupError:
        reason = f"HTML in the unknown encoding {declared}"
        raise Refused(reason, hint="convert it to UTF-8") from None
    except UnicodeError:
        if name in _LATIN:  # five bytes are no characters in Windows' superset
            return data.decode("latin-1")
        raise Refused(f"says that it is {declared} text, and is not") from None


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines = Lines()
        self._line: list[str] = []
        self._mark = ""
        self._skipped: str | None = None
        self._pre = 0
        self._blank = True

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if self._skipped:
            return
        if tag in _SKIPPED:
            self._skipped = tag
        elif tag in _CELLS:
            if "".join(self._line).strip():
                self._line.append(" | ")
        elif tag in _BREAKS:
            self._end_line()
            self._pre += tag == "pre"
            if tag == "li":
                self._mark = "- "
            elif len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
                self._mark = "#" * int(tag[1]) + " "

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag == self._skipped:
                self._skipped = None
        elif tag in _BREAKS:
            self._end_line()
            self._pre = max(self._pre - (tag == "pre"), 0)
            self._mark = ""
            if tag not in ("li", "tr", "br", "dt", "option"):
                self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if not self._pre:
            self._line.append(re.sub(r"[ \t\r\n\f]+", " ", data))
            return
        *whole, rest = data.split("\n")
        for line in whole:
            self._line.append(line)
            self._end_line()
        self._line.append(rest)

    def text(self) -> str:
        """All of it; after this the parser takes no more."""
        self._end_line()
        return self._lines.text()

    def _end_line(self) -> None:
        line = "".join(self._line)
        self._line = []
        if not self._pre:
            line = re.sub(" +", " ", line).strip()
        if line.strip():
            self._lines.add(self._mark + line)
            self._mark = ""
            self._blank = False

    def _end_paragraph(self) -> None:
        if not self._blank:
            self._lines.add("")
            self._blank = True
