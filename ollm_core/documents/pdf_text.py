"""PDF as text, by pypdf (the extra `ollm-core[documents]`)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from ollm_core.documents.extracted import Extracted, Lines, Refused

if TYPE_CHECKING:
    from pypdf import PdfReader

MAX_PAGES = 10_000
_UNREADABLE = 0.05
"""The share of characters without a meaning from which a text is told to be damaged."""
_SCANNED = "recognise its text first, for example with ocrmypdf"
_UNLOCK = "save a copy without a password, for example with qpdf --decrypt"


def extract(data: bytes, grant: Callable[[int], None] = lambda pages: None) -> Extracted:
    """The text of all pages, an empty line between two. `grant` is told how many there are, before
    they are read. Raises Refused.
    """
    reader = _opened(data)
    num_pages = len(reader.pages)
    if num_pages > MAX_PAGES:
        raise Refused(f"need at most {MAX_PAGES} pages, have {num_pages}", hint="split the PDF")
    grant(num_pages)
    lines, empty = Lines(), []
    for number in range(num_pages):
        try:
            text = reader.pages[number].extract_text().strip()
        except MemoryError:
            raise
        except Exception as error:
            error.add_note(f"page {number + 1}:")
            raise
        if text:
            lines.add(text + "\n")
        else:
            empty.append(number + 1)
    if len(empty) == num_pages:
        raise Refused("a PDF without text, as scans are", hint=_SCANNED)
    return Extracted(lines.text(), tuple(_remarks(lines.text(), empty)))


def _opened(data: bytes) -> PdfReader:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(io.BytesIO(data))
        locked = reader.is_encrypted and not reader.decrypt("")
    except DependencyError:  # for a cipher that pypdf alone does not have
        locked = True
    if locked:
        raise Refused("an encrypted PDF", hint=_UNLOCK)
    return reader


def _remarks(text: str, empty: list[int]) -> list[str]:
    remarks = []
    if empty:
        some = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
        remarks.append(f"no text on {len(empty)} of its pages ({some}): blank, or scans")
    if text.count("\ufffd") > _UNREADABLE * len(text):
        remarks.append("its fonts do not say what many of its characters mean")
    return remarks
