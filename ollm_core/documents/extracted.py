"""What readers of documents return, and how they refuse one."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHARS = 100_000_000
"""Of a document's text: more than any model has positions for."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """The text of a document."""

    text: str
    remarks: tuple[str, ...] = ()
    """What it lacks, in one line each."""


class Refused(Exception):
    """A document that cannot be read: why, in words that follow the file's name and a colon."""

    def __init__(self, reason: str, *, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class Lines:
    """Collects lines of text, up to MAX_CHARS."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._num_chars = 0

    def add(self, line: str) -> None:
        """Raises Refused if the text becomes too long."""
        self._num_chars += len(line) + 1
        if self._num_chars > MAX_CHARS:
            raise Refused(f"more than the {MAX_CHARS} characters that a document may have")
        self._lines.append(line)

    def text(self) -> str:
        """The lines, one below the other."""
        return "\n".join(self._lines)
