"""PDF as text."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_core.documents import pdf_text
from ollm_core.documents.extracted import Refused
from ollm_core.documents.pdf_text import extract
from ollm_core.documents.process import extract as answer
from ollm_core.documents.reading import Limits, read_opened
from ollm_core.errors import InputError


def test_pages(make_pdf):
    """In order, an empty line between two; pages without text are told."""
    granted: list[int] = []
    found = extract(make_pdf(["The heron is grey.", "", "Ärger."]), granted.append)
    assert found.text == "The heron is grey.\n\nÄrger.\n"
    assert found.remarks == ("no text on 1 of its pages (2): blank, or scans",)
    assert granted == [3]
    assert extract(make_pdf(["a", "b"])).remarks == ()


def test_many_pages_without_text(make_pdf):
    """Are named up to a number."""
    (remark,) = extract(make_pdf(["a", *[""] * 20])).remarks
    assert remark == "no text on 20 of its pages (2, 3, 4, 5, 6, 7, 8, 9, ...): blank, or scans"


def test_a_scan(make_pdf):
    """Has no text at all: refused, not read as an empty one."""
    with pytest.raises(Refused, match="a PDF without text, as scans are") as refused:
        extract(make_pdf(["", ""]))
    assert "ocrmypdf" in refused.value.hint


def test_encrypted(make_pdf):
    """With a password it is refused; one that only the owner has keeps nobody from reading."""
    with pytest.raises(Refused, match="an encrypted PDF") as refused:
        extract(make_pdf(["secret"], password="p"))
    assert "qpdf" in refused.value.hint
    assert extract(make_pdf(["open"], password="")).text == "open\n"


def test_a_cipher_that_is_missing(make_pdf, monkeypatch):
    """pypdf needs another library for AES: the same line."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    def decrypt(*_):
        raise DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(PdfReader, "decrypt", decrypt)
    with pytest.raises(Refused, match="an encrypted PDF"):
        extract(make_pdf(["secret"], password="p"))


def test_too_many_pages(make_pdf, monkeypatch):
    """Are refused before any is read."""
    monkeypatch.setattr(pdf_text, "MAX_PAGES", 2)
    with pytest.raises(Refused, match="need at most 2 pages, have 3"):
        extract(make_pdf(["a", "b", "c"]))


def test_characters_without_a_meaning(make_pdf, monkeypatch):
    """A text that is full of them is told."""
    from pypdf import PageObject

    monkeypatch.setattr(PageObject, "extract_text", lambda self: "\ufffd\ufffd x")
    assert extract(make_pdf(["a"])).remarks == (
        "its fonts do not say what many of its characters mean",
    )


def test_a_damaged_page_is_named(make_pdf, monkeypatch):
    """No page is left out silently."""
    from pypdf import PageObject

    def fails(self):
        raise ValueError("bad\nstream")

    monkeypatch.setattr(PageObject, "extract_text", fails)
    assert answer("pdf", make_pdf(["a"])) == {"refused": "a damaged PDF: page 1: bad stream"}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damage_is_told(make_pdf, data):
    """Bytes that change and ends that are missing: a text or one line, in bounded time."""
    damaged = bytearray(make_pdf(["The heron is grey.", "Next."]))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(8, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = damaged[: data.draw(st.integers(9, len(damaged)))]
    told = "a.pdf: read"
    try:
        read_opened(io.BytesIO(damaged), "a.pdf", limits=Limits(cpu_seconds=10))
    except InputError as error:
        told = str(error)
    assert told.startswith("a.pdf: ")
    assert "\n" not in told
