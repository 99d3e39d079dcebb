"""Files as text: the kinds through the process that reads them, its limits, and one line for each
that cannot be read.
"""

from __future__ import annotations

import io
import sys
import zlib
from pathlib import Path

import pytest

from ollm_core.documents import reading
from ollm_core.documents.reading import Limits, read_document, read_opened, tidy
from ollm_core.errors import InputError


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file into the test's directory."""

    def write(content: bytes | str, name: str = "file") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.py", "a.json"])
def test_plain_text_stays_as_it_is(write, name: str):
    """Character by character, but for the newlines at its end."""
    text = "# One\r\n\r\n\r\n\r\n  <b>two</b>\t \n| a | b |"
    assert read_document(write(text + "\n\n", name)) == text


def test_a_page(write):
    """As its text, or as it is."""
    page = "<html><h1>Birds</h1><p>The heron\nis grey.\n"
    assert read_document(write(page, "a.txt")) == "# Birds\n\nThe heron is grey."
    assert read_document(write(page, "a.html"), as_text=True) == page.rstrip("\n")


def test_a_pdf(write, make_pdf):
    """Remarks name the file."""
    remarks: list[str] = []
    path = write(make_pdf(["The heron is grey.", "", "Next."]), "a.pdf")
    assert read_document(path, remark=remarks.append) == "The heron is grey.\n\nNext."
    assert remarks == [f"{path}: no text on 1 of its pages (2): blank, or scans"]


def test_a_docx(write, docx: bytes):
    """Whatever its name is."""
    text = read_document(write(docx, "a.txt"))
    assert text.startswith("# Birds\nThe heron is grey.\tÄ 鷺\n- one\na | b\n")
    assert text.endswith("\n\nend")


def test_standard_input(make_pdf, docx: bytes):
    """Text, unless it is recognisably another kind."""
    assert read_opened(io.BytesIO(b"a <b>\n"), "stdin") == "a <b>"
    assert read_opened(io.BytesIO(b""), "stdin") == ""
    assert read_opened(io.BytesIO(make_pdf(["heron"])), "stdin") == "heron"
    assert read_opened(io.BytesIO(docx), "stdin").startswith("# Birds")


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"", "a", "it is empty"),
        (b" \n\n", "a.md", "it is empty"),
        (b"<html><script>x</script>", "a", "it has no text"),
        (b"gr\xfcn", "a", "is not UTF-8 text: byte 2 is 0xfc"),
        (b"\x7fELF\0", "a", "a binary file"),
        (b"%PDF-1.7\nnothing", "a.pdf", "a damaged PDF: "),
        (b"PK\3\4nothing", "a.docx", "a damaged DOCX: File is not a zip file"),
        (b"hello", "a.pdf", "is named .pdf"),
    ],
)
def test_one_line_for_what_cannot_be_read(write, content: bytes, name: str, reason: str):
    """It begins with the file's name."""
    path = write(content, name)
    with pytest.raises(InputError) as refused:
        read_document(path)
    assert refused.value.message.startswith(f"{path}: ")
    assert reason in refused.value.message
    assert "\n" not in str(refused.value)


def test_files_that_are_not_there(tmp_path: Path):
    """Or cannot be opened."""
    for path, reason in ((tmp_path / "no", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"cannot read {path}: {reason}"):
            read_document(path)


def test_too_large_a_file(write, monkeypatch):
    """Is refused by its size; a device never ends."""
    monkeypatch.setattr(reading, "MAX_BYTES", 10)
    assert read_document(write("a" * 10)) == "a" * 10
    for path in (write("a" * 11), Path("/dev/zero")):
        with pytest.raises(InputError, match="more than the 10 B that a text may have"):
            read_document(path)


def test_without_the_library(write, make_pdf, monkeypatch):
    """A PDF needs one: the line says how to get it. Other kinds do without."""
    path = write(make_pdf(["a"]))
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="a PDF needs pypdf, which is not installed") as refused:
        read_document(path)
    assert refused.value.hint == "pip install 'ollm-core[documents]'"
    assert read_document(write("<html>a", "a.html")) == "a"


def test_a_pdf_that_unpacks_to_too_much(write):
    """Ends with one line and not with the machine's memory."""
    stream = zlib.compress(b"(x) Tj " * 30_000_000)
    assert len(stream) < 1_000_000
    pdf = (
        b"%%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/Contents 4 0 R/MediaBox[0 0 9 9]>>endobj\n"
        b"4 0 obj<</Filter/FlateDecode/Length %d>>stream\n%s\nendstream endobj\n"
        b"trailer<</Root 1 0 R>>\n" % (len(stream), stream)
    )
    with pytest.raises(InputError, match=r"damaged PDF|too much memory|too long"):
        read_document(write(pdf), limits=Limits(memory_bytes=400 << 20, cpu_seconds=5))


def test_time_is_bounded(write):
    """By the kernel: Python's parser takes the square of this page's size."""
    with pytest.raises(InputError, match="reading it takes too long"):
        read_document(write("<html>" + "<a x=" * 60_000), limits=Limits(cpu_seconds=0))


def test_memory_is_bounded(write):
    """By the kernel."""
    with pytest.raises(InputError, match=r"too much memory|ended with code"):
        read_document(write("<html>" + "<p>x" * 100), limits=Limits(memory_bytes=1 << 20))


def test_nothing_is_imported_from_where_the_user_works(write, tmp_path: Path, monkeypatch):
    """A document's directory may hold a json.py."""
    write("raise SystemExit('hacked')", "json.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert read_document(write("<html>a", "a.html")) == "a"


def test_text_is_tidied():
    """Without what is no text."""
    assert tidy("\n a\x00\x07 \r\nb\f\n\n\n\nc\ud800\t\n") == " a\nb\n\nc"
