"""DOCX as text: a ZIP archive of XML files, of which only those with text are read.

By the standard library's own parsers. Libraries for the format build all of a document, pictures
included, and their paragraphs leave out what lies in tracked changes, content controls and text
boxes; here every `w:t` of the document as it would be printed is read, in order, in a memory that
does not grow with the archive. A document type definition, and so any entity of its own, is
refused.
"""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat
from zipfile import ZipFile

from ollm_core.documents.extracted import MAX_CHARS, Extracted, Lines, Refused

MAX_XML_BYTES = 4 * MAX_CHARS
"""Of one file in the archive, unpacked."""
_MAX_DEPTH = 1000
_MAX_FILES = 20_000
_PIECE = 1 << 20
_SEPARATOR = "}"
_KNOWN = re.compile(
    r"http://(schemas\.openxmlformats\.org|purl\.oclc\.org/ooxml)/"
    r"(wordprocessingml/|officeDocument/(2006/)?math)"
)
_LEFT_OUT = {"del", "moveFrom"}
"""What tracked changes have removed, or moved to where it is read."""
_DOCUMENT = "/officeDocument"
_NOTES = {"footnotes": "", "endnotes": "e"}
"""Their files beside the document, and what their numbers begin with."""


def extract(data: bytes) -> Extracted:
    """The text of a document, then its notes. Headings begin with `#`, items with `-`; cells of a
    row are on one line, and notes are `[^1]`. Raises Refused.
    """
    lines = Lines()
    with ZipFile(io.BytesIO(data)) as archive:
        names = set(archive.namelist())
        if len(names) > _MAX_FILES:
            raise Refused(f"more than the {_MAX_FILES} files that a DOCX may have")
        document = _document_of(archive, names)
        _Walk(lines).parse(_pieces(archive, document))
        for name, mark in _NOTES.items():
            file = posixpath.join(posixpath.dirname(document), f"{name}.xml")
            if file in names:
                _Walk(lines, mark).parse(_pieces(archive, file))
    return Extracted(lines.text())


def _document_of(archive: ZipFile, names: set[str]) -> str:
    """The file that has the text, as the archive's relationships name it."""
    found: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if name.endswith(f"{_SEPARATOR}Relationship"):
            kind, target = attributes.get("Type", ""), attributes.get("Target", "")
            if kind.endswith(_DOCUMENT) and attributes.get("TargetMode") != "External":
                found.append(posixpath.normpath(target.lstrip("/")))

    if "_rels/.rels" in names:
        _parse(_pieces(archive, "_rels/.rels"), start=start)
    for name in found:
        if name in names and not re.match("(xl|ppt|visio)/", name):
            return name
    raise Refused("a ZIP archive that is not a DOCX", hint="give the documents in it one by one")


def _pieces(archive: ZipFile, name: str) -> Iterator[bytes]:
    """A file of the archive, unpacked piece by piece: what its directory says of sizes is not
    believed.
    """
    if archive.getinfo(name).flag_bits & 1:
        raise Refused("an encrypted archive", hint="save it as .docx without a password")
    num_bytes = 0
    with archive.open(name) as opened:
        while piece := opened.read(_PIECE):
            num_bytes += len(piece)
            if num_bytes > MAX_XML_BYTES:
                raise Refused(f"{name} in it unpacks to more than {MAX_XML_BYTES} bytes")
            yield piece


def _parse(
    pieces: Iterator[bytes],
    *,
    start: Callable[[str, dict[str, str]], None],
    end: Callable[[str], None] | None = None,
    text: Callable[[str], None] | None = None,
) -> None:
    parser = expat.ParserCreate(namespace_separator=_SEPARATOR)
    depth = 0

    def starts(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _MAX_DEPTH:
            raise Refused("XML nested too deeply")
        start(name, attributes)

    def ends(name: str) -> None:
        nonlocal depth
        depth -= 1
        if end:
            end(name)

    def refuse(*_: Any) -> None:
        raise Refused("XML with a document type, which no DOCX has")

    parser.StartElementHandler = starts
    parser.EndElementHandler = ends
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.buffer_text = True
    for piece in pieces:
        parser.Parse(piece, False)
    parser.Parse(b"", True)


@dataclass(slots=True)
class _Cell:
    """A cell of a table, or the document itself."""

    lines: list[str] = field(default_factory=list)
    row: list[str] = field(default_factory=list)
    """Of a table in it: the cells that have ended."""


class _Walk:
    """Adds the paragraphs of one file to `lines`; those of notes with their numbers, which begin
    with `notes`.
    """

    def __init__(self, lines: Lines, notes: str | None = None) -> None:
        self._lines = lines
        self._notes = notes
        self._names: list[str] = []
        self._paragraphs: list[list[str]] = []
        self._marks: list[str] = []
        self._cells = [_Cell()]
        self._reading = False
        self._left_out = 0
        self._note = ""

    def parse(self, pieces: Iterator[bytes]) -> None:
        _parse(pieces, start=self._start, end=self._end, text=self._text)

    def _start(self, qualified: str, attributes: dict[str, str]) -> None:
        namespace, _, name = qualified.rpartition(_SEPARATOR)
        within = self._names[-1] if self._names else ""
        known = bool(_KNOWN.match(namespace))
        self._names.append(name if known else "")
        values = {key.rpartition(_SEPARATOR)[2]: value for key, value in attributes.items()}
        if self._left_out or self._is_left_out(name, known, values):
            self._left_out += 1
        elif not known:
            return
        elif name == "p":
            self._paragraphs.append([])
            self._marks.append("")
        elif name == "tc":
            self._cells.append(_Cell())
        elif name in ("footnote", "endnote"):
            self._note = f"[^{self._notes}{values.get('id', '')}]: "
        elif self._paragraphs:
            self._start_within(name, within, values)

    def _start_within(self, name: str, within: str, values: dict[str, str]) -> None:
        """An element of a paragraph."""
        said = self._paragraphs[-1]
        if name == "t":
            self._reading = True
        elif within == "r" and name == "tab":
            said.append("\t")
        elif within == "r" and name in ("br", "cr"):
            said.append("\n")
        elif within == "r" and name == "noBreakHyphen":
            said.append("-")
        elif name in ("footnoteReference", "endnoteReference"):
            said.append(f"[^{_NOTES[name.removesuffix('Reference') + 's']}{values.get('id', '')}]")
        elif name == "numId" and values.get("val") != "0":  # 0: none
            self._marks[-1] = self._marks[-1] or "- "
        elif name == "pStyle":
            heading = re.fullmatch(r"[Hh]eading ?([1-9])", values.get("val", ""))
            title = values.get("val", "").lower() == "title"
            if heading or title:
                self._marks[-1] = "#" * (int(heading[1]) if heading else 1) + " "
            elif values.get("val", "").startswith(("ListBullet", "ListNumber")):
                self._marks[-1] = "- "

    def _is_left_out(self, name: str, known: bool, values: dict[str, str]) -> bool:
        """Whether an element, and all in it, is not of the text: it is there twice, for programs
        that do not know the first; it has been removed; or it is the line above notes, as a note.
        """
        return (name in _LEFT_OUT if known else name == "Fallback") or (
            name in ("footnote", "endnote") and values.get("type", "normal") != "normal"
        )

    def _text(self, text: str) -> None:
        if self._reading and not self._left_out:
            self._paragraphs[-1].append(text)

    def _end(self, _: str) -> None:
        name = self._names.pop()
        if self._left_out:
            self._left_out -= 1
        elif name == "t":
            self._reading = False
        elif name == "p":
            said = "".join(self._paragraphs.pop()).rstrip()
            self._add(self._marks.pop() + said if said.strip() else "")
        elif name == "tc":
            cell = self._cells.pop()
            text = " ".join(line for line in cell.lines if line).replace("\n", " ")
            self._cells[-1].row.append(text)
        elif name == "tr":
            row = self._cells[-1].row
            self._add(" | ".join(row))
            row.clear()
        elif name == "tbl":
            self._add("")
        elif name in ("footnote", "endnote"):
            self._note = ""

    def _add(self, line: str) -> None:
        if len(self._cells) > 1:
            self._cells[-1].lines.append(line)
        else:
            self._lines.add(self._note + line if line else "")
            if line:
                self._note = ""
