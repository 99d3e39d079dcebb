"""What a document is, whatever its name says; and text in its encodings."""

import pytest

from ollm_core.documents.extracted import Refused
from ollm_core.documents.kinds import decoded, kind_of


@pytest.mark.parametrize(
    ("data", "suffix", "kind"),
    [
        (b"hello", "", "text"),
        (b"# A heading\n<p>", ".md", "text"),
        (b"", ".txt", "text"),
        (b"%PDF-1.7\n", ".txt", "pdf"),
        (b"\n %PDF-1.7\n", "", "pdf"),
        (b"junk before %PDF-1.4", ".PDF", "pdf"),
        (b"It begins with %PDF-1.4, they say", ".txt", "text"),
        (b"PK\3\4...", ".pdf", "docx"),
        (b"<!DOCTYPE html><p>", "", "html"),
        (b"\xef\xbb\xbf\n<!-- a\nb --><HTML lang=en>", ".txt", "html"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">', "", "html"),
        (b"<p>A fragment", ".htm", "html"),
        (b"<p>A fragment", ".txt", "text"),
        (b"<htmlx>", "", "text"),
        (b"<!---->" * 140 + b"<p>", "", "text"),  # one way to match, not 2 to the power of 140
    ],
)
def test_content_first_then_suffix(data: bytes, suffix: str, kind: str):
    """A suffix decides only what the content leaves open."""
    assert kind_of(data, suffix) == kind


@pytest.mark.parametrize(
    ("data", "suffix", "reason", "hint"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ".doc", "encrypted, or older", "save it as .docx"),
        (b"{\\rtf1", ".rtf", "an RTF file", "save it as .docx"),
        (b"hello", ".pdf", "is named .pdf, and is not one", "give plain text"),
        (b"hello", ".docx", "is named .docx, and is not one", "give plain text"),
    ],
)
def test_kinds_that_are_not_read(data: bytes, suffix: str, reason: str, hint: str):
    """Each says what to do."""
    with pytest.raises(Refused, match=reason) as refused:
        kind_of(data, suffix)
    assert refused.value.hint.startswith(hint)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(encoding: str):
    """UTF-8, and any that says what it is."""
    assert decoded("Äußerst grün 鷺\n".encode(encoding)) == "Äußerst grün 鷺\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("grün".encode("latin-1"), "is not UTF-8 text: byte 2 is 0xfc"),
        (b"\xef\xbb\xbf\xff", "is not UTF-8 text: byte 3 is 0xff"),
        (b"\xff\xfea", "is not UTF-16 text"),
        ("ab".encode("utf-16-le"), "a binary file, or text in UTF-16 without its mark"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff", "a binary file"),
    ],
)
def test_what_is_no_text(data: bytes, reason: str):
    """It is told from text in another encoding."""
    with pytest.raises(Refused, match=reason) as refused:
        decoded(data)
    assert refused.value.hint
