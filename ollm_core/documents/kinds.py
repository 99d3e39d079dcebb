"""Recognises what a document is: by its content first, then by its file's suffix."""

from __future__ import annotations

import codecs
import re

from ollm_core.documents.extracted import Refused

_START = 1024
"""Bytes at the start of a file in which its kind shows."""
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16: its mark begins with that of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HTML = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?(?>(?:<!--.*?-->\s*)*)(?:<!doctype\s+html|<html)[\s>]",
    re.IGNORECASE | re.DOTALL,
)
_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_READABLE = "give plain text, Markdown, HTML, PDF or DOCX"
_UTF8 = "convert it: iconv -f ISO-8859-1 -t UTF-8 (or from the encoding that it has)"


def kind_of(data: bytes, suffix: str) -> str:
    """`text`, `html`, `pdf` or `docx`. `suffix` is the file's, as `.pdf`, or empty. Raises Refused
    for what is known to be none of them.
    """
    start = data[:_START].removeprefix(codecs.BOM_UTF8)
    suffix = suffix.lower()
    if start.lstrip().startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in start):
        return "pdf"
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "docx"  # or another ZIP archive, which its reader refuses
    if start.startswith(b"\xd0\xcf\x11\xe0"):
        raise Refused(
            "an Office file that is encrypted, or older than DOCX",
            hint="save it as .docx without a password",
        )
    if start.startswith(b"{\\rtf"):
        raise Refused("an RTF file", hint="save it as .docx or as plain text")
    if suffix in (".pdf", ".docx"):
        raise Refused(f"is named {suffix}, and is not one", hint=_READABLE)
    if _HTML.match(start) or suffix in _HTML_SUFFIXES:
        return "html"
    return "text"


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in what its byte order mark says. Raises Refused for any other, and for
    what is no text.
    """
    bom = next((mark for mark in _BOMS if data.startswith(mark)), b"")
    encoding = _BOMS.get(bom, "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if bom or b"\0" not in data:
            where = f"byte {error.start} is 0x{data[error.start]:02x}"
            raise Refused(f"is not {encoding.upper()} text: {where}", hint=_UTF8) from None
        text = "\0"
    if "\0" in text:
        raise Refused("a binary file, or text in UTF-16 without its mark", hint=_READABLE)
    return text.removeprefix("\ufeff")
