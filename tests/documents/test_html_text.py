"""HTML as text."""

import pytest

from ollm_core.documents.extracted import Refused
from ollm_core.documents.html_text import extract
from ollm_core.documents.process import extract as answer


def text_of(source: str | bytes) -> str:
    return extract(source if isinstance(source, bytes) else source.encode()).text


def test_a_page():
    """Headings, paragraphs, items, rows and listings; words that belong together stay so."""
    page = """<!doctype html><title>Birds &amp; more</title><style>p {color: red}</style>
    <script>if (a < b) document.write('<p>no</p>')</script><template><p>no</p></template>
    <h2>The <i>he</i>ron</h2><p>It is
       <b>grey</b>.<br>It fl&iacute;es.<p>Next
    <ul><li><p>one</p><li>two</ul>
    <table><tr><th>a<th>b</tr><tr><td>1</td><td>2</td></tr></table>
    <pre>def f():\n    return  1</pre>tail"""
    assert [line for line in text_of(page).split("\n") if line] == [
        "Birds & more", "## The heron", "It is grey.", "It flíes.", "Next", "- one", "- two",
        "a | b", "1 | 2", "def f():", "    return  1", "tail",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        '<meta charset="ISO-8859-1"><p>grün'.encode("latin-1"),
        '<meta http-equiv="x" content="text/html; charset=windows-1252"><p>grün'.encode("cp1252"),
        '<?xml version="1.0" encoding="iso-8859-15"?><p>grün'.encode("iso8859-15"),
        "<meta charset=utf-16><p>grün".encode(),
        '<meta charset="latin1"><p>grün'.encode("utf-8-sig"),
        "<p>grün".encode("utf-16"),
        "<p>grün".encode(),
    ],
)
def test_the_encoding_that_a_page_says(page: bytes):
    """A mark goes before it; Latin-1 is read as browsers do."""
    assert text_of(page) == "grün"


def test_quotes_of_windows_in_a_page_of_latin_1():
    """As browsers read it, and what even Windows does not have."""
    assert text_of(b"<meta charset=latin1><p>\x93a\x94") == "“a”"
    assert text_of(b"<meta charset=latin1><p>a\x81\xfc").endswith("ü")


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"<meta charset=klingon><p>x", "unknown encoding klingon"),
        (b"<meta charset=hex><p>x", "unknown encoding hex"),
        (b"<meta charset=utf-8><p>\xfc", "says that it is utf-8 text, and is not"),
        (b"<p>\xfc", "is not UTF-8 text"),
    ],
)
def test_encodings_that_are_wrong(page: bytes, reason: str):
    """No character is guessed."""
    with pytest.raises(Refused, match=reason):
        extract(page)


@pytest.mark.parametrize(
    "page", ["<p" * 1000, "<![x[", "<!--", "</p>" * 99, "<b>" * 100_000 + "x", "&#1114112;&#0;"]
)
def test_damaged_pages(page: str):
    """Are read as far as they go, or refused in one line."""
    found = answer("html", page.encode())
    assert found.keys() == {"text", "remarks"} or found["refused"].startswith("a damaged HTML: ")
