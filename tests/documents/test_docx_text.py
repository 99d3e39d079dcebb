"""DOCX as text."""

import io
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_core.documents import docx_text
from ollm_core.documents.docx_text import extract
from ollm_core.documents.extracted import Refused
from ollm_core.documents.process import extract as answer

SPACES = (
    'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" '
    'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006" '
    'xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
)


def last_line(data: bytes) -> str:
    return extract(data).text.rstrip("\n").split("\n")[-1]


def run(text: str) -> str:
    return f"<w:r><w:t>{text}</w:t></w:r>"


def test_a_document(docx: bytes):
    """As python-docx writes it: in order, with the table in a cell."""
    lines = extract(docx).text.split("\n")
    assert [line for line in lines if line] == [
        "# Birds", "The heron is grey.\tÄ 鷺", "- one", "a | b", "c |  | deep", "end",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("xml", "text"),
    [
        (f"<w:ins>{run('inserted')}</w:ins>", "inserted"),
        (f"<w:sdt><w:sdtContent>{run('a control')}</w:sdtContent></w:sdt>", "a control"),
        (f"<w:hyperlink>{run('a link')}</w:hyperlink>", "a link"),
        (f"<w:moveFrom>{run('here')}</w:moveFrom><w:moveTo>{run('there')}</w:moveTo>", "there"),
        ("<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>" + run("kept"), "kept"),
        ("<w:r><w:instrText>PAGE</w:instrText></w:r>" + run("7"), "7"),
        ("<w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:noBreakHyphen/><w:t>c</w:t></w:r>", "a\tb-c"),
        ("<w:r><w:t>a</w:t><w:br/><w:t>b</w:t></w:r>", "b"),
        ("<m:oMath><m:r><m:t>x=1</m:t></m:r></m:oMath>", "x=1"),
        (
            "<w:r><mc:AlternateContent><mc:Choice><w:t>new</w:t></mc:Choice>"
            "<mc:Fallback><w:t>old</w:t></mc:Fallback></mc:AlternateContent></w:r>",
            "new",
        ),
        ('<w:r><w:t xml:space="preserve">a &lt; </w:t></w:r>' + run("b"), "a &lt; b"),
    ],
)
def test_text_wherever_it_lies(edited, xml: str, text: str):
    """What a reader of the printed document sees, once; nothing that was removed."""
    xml = xml.replace("<w:", "<w:", 1)
    data = edited(f"<w:r {SPACES}/>" + _declared(xml))
    assert last_line(data) == text.replace("&lt;", "<")


def _declared(xml: str) -> str:
    """The prefixes that python-docx does not declare, in each outermost element."""
    return xml.replace("<m:oMath>", f"<m:oMath {SPACES}>").replace(
        "<mc:AlternateContent>", f"<mc:AlternateContent {SPACES}>"
    )


def test_notes_are_at_the_end(edited):
    """With their numbers; the line above them is none."""
    notes = (
        f"<w:footnotes {SPACES}>"
        f'<w:footnote w:id="-1" w:type="separator"><w:p>{run("line")}</w:p></w:footnote>'
        f'<w:footnote w:id="2"><w:p>{run("See there.")}</w:p></w:footnote></w:footnotes>'
    )
    data = edited(run("Said") + '<w:r><w:footnoteReference w:id="2"/></w:r>', footnotes=notes)
    lines = [line for line in extract(data).text.split("\n") if line]
    assert lines[-2:] == ["Said[^2]", "[^2]: See there."]


def test_a_text_box_is_read(edited):
    """A paragraph within one stands before it."""
    box = f"<w:r><w:pict><w:txbxContent><w:p>{run('box')}</w:p></w:txbxContent></w:pict></w:r>"
    assert extract(edited(box + run("outer"))).text.rstrip().endswith("box\nouter")


@pytest.mark.parametrize(
    ("before", "xml"),
    [
        ('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>', run("&e;")),
        ('<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>', run("&b;")),
        ('<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">', run("x")),
    ],
)
def test_entities_are_refused(edited, before: str, xml: str):
    """No file is read, no address is asked, nothing multiplies."""
    with pytest.raises(Refused, match="XML with a document type"):
        extract(edited(xml, before=before))


def test_a_zip_bomb(edited, monkeypatch):
    """Is noticed by what comes out of it; files that are not read may be anything."""
    bomb = edited(run("a" * 2_000_000), picture="b" * 50_000_000)
    assert len(bomb) < 200_000
    assert last_line(bomb) == "a" * 2_000_000
    monkeypatch.setattr(docx_text, "MAX_XML_BYTES", 1_000_000)
    with pytest.raises(Refused, match=r"word/document.xml in it unpacks to more than 1000000"):
        extract(bomb)


def test_nesting(edited):
    """Is bounded."""
    deep = "<w:ins>" * 2000 + run("x") + "</w:ins>" * 2000
    with pytest.raises(Refused, match="nested too deeply"):
        extract(edited(deep))


def test_archives_that_are_none(docx: bytes):
    """Another ZIP archive, an encrypted one, and one of too many files."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("_rels/.rels", "<Relationships/>")
    with pytest.raises(Refused, match="a ZIP archive that is not a DOCX") as refused:
        extract(made.getvalue())
    assert refused.value.hint
    with zipfile.ZipFile(io.BytesIO(docx)) as archive:
        at = [info.header_offset for info in archive.infolist()]
    locked = bytearray(docx)
    for offset in at:
        locked[offset + 6] |= 1
    central = 0
    while (central := docx.find(b"PK\1\2", central)) >= 0:
        locked[central + 8] |= 1
        central += 4
    with pytest.raises(Refused, match="an encrypted archive"):
        extract(bytes(locked))
    with zipfile.ZipFile(made, "a") as archive:
        for number in range(20_000):
            archive.writestr(f"{number}", "")
    with pytest.raises(Refused, match="more than the 20000 files"):
        extract(made.getvalue())


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damage_is_told(docx: bytes, data):
    """Bytes that change and ends that are missing: a text or one line."""
    damaged = bytearray(docx)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))] or damaged
    found = answer("docx", bytes(damaged))
    assert found.keys() in ({"text", "remarks"}, {"refused"}, {"refused", "hint"})
    assert "\n" not in found.get("refused", "")
