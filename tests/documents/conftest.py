"""Small real documents, made by the libraries that people make theirs with."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence

import pytest

MakePdf = Callable[..., bytes]


@pytest.fixture(scope="session")
def make_pdf() -> MakePdf:
    """Writes a PDF with one line on each page, or none; `password` locks it, `owner` only marks it
    as not to be changed.
    """
    from pypdf import PdfWriter
    from reportlab.pdfgen.canvas import Canvas

    def make(pages: Sequence[str], *, password: str | None = None, owner: str = "o") -> bytes:
        made = io.BytesIO()
        canvas = Canvas(made)
        for line in pages:
            canvas.drawString(100, 700, line)
            canvas.showPage()
        canvas.save()
        if password is None:
            return made.getvalue()
        writer, locked = PdfWriter(clone_from=made), io.BytesIO()
        writer.encrypt(password, owner, algorithm="RC4-128")
        writer.write(locked)
        return locked.getvalue()

    return make


@pytest.fixture(scope="session")
def docx() -> bytes:
    """A heading, a sentence, an item, a table with one in a cell of it, and a last line."""
    from docx import Document

    document = Document()
    document.add_heading("Birds", 1)
    document.add_paragraph("The heron is grey.\tÄ 鷺")
    document.add_paragraph("one", style="List Bullet")
    table = document.add_table(2, 2)
    for row, column, text in ((0, 0, "a"), (0, 1, "b"), (1, 0, "c")):
        table.cell(row, column).text = text
    table.cell(1, 1).add_table(1, 2).cell(0, 1).text = "deep"
    document.add_paragraph("end")
    made = io.BytesIO()
    document.save(made)
    return made.getvalue()


@pytest.fixture(scope="session")
def edited(docx: bytes) -> Callable[..., bytes]:
    """That document with its last line replaced by other XML, and files added to it."""

    def edit(xml: str = "", *, before: str = "", **files: str) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(docx)) as old, zipfile.ZipFile(made, "w", 8) as new:
            for name in old.namelist():
                content = old.read(name)
                if name == "word/document.xml":
                    content = content.replace(b"<w:t>end</w:t></w:r>", b"</w:r>" + xml.encode())
                    assert xml.encode() in content
                    content = content.replace(b"<w:document", before.encode() + b"<w:document", 1)
                new.writestr(name, content)
            for name, text in files.items():
                new.writestr(f"word/{name}.xml", text)
        return made.getvalue()

    return edit
