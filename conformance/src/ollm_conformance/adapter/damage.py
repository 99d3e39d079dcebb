"""Ways in which files of kept KV get damaged. Every file is taken as it is on disk, so that a new
kind of file is damaged too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PAGE = 4096
"""Bytes of the header that every file begins with."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage to a directory of kept KV."""

    what: str
    apply: Callable[[Path], None]
    """Does it to a copy of the directory."""
    again: bool = False
    """Whether a second run is worth its time."""


def damages(directory: Path) -> Iterator[Damage]:
    """Damages to the files that are in `directory`: to the last of each kind, and where there are
    two of a kind and a size, both exchanged.
    """
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        kinds.setdefault(path.suffix, []).append(path.relative_to(directory))
    for paths in kinds.values():
        first, last = paths[0], paths[-1]
        size = (directory / last).stat().st_size
        told, inside = _told(last), _PAGE + (size - _PAGE) // 8
        yield Damage(f"{told} changed in its last bit", _flip(last, None), again=True)
        yield Damage(f"{told} changed in one bit at byte {inside}", _flip(last, inside))
        yield Damage(f"{told} with another number in its header", _edit_header(last))
        yield Damage(f"{told} cut by one byte", _cut(last, size - 1))
        yield Damage(f"{told} with bytes after its end", _append(last))
        yield Damage(f"{told} with its two halves exchanged", _exchange_halves(last))
        if first != last and (directory / first).stat().st_size == size:
            yield Damage(f"{_told(first)} and {told} exchanged", _exchange(first, last))


def _told(path: Path) -> str:
    """A file by what it is: names of tokens and of directories differ from run to run."""
    return path.name if len(path.name) < 20 else f"a file *{path.suffix}"


def _flip(path: Path, place: int | None) -> Callable[[Path], None]:
    """One high bit of a byte, that of the exponent where it ends a number; None: of the last byte
    that is not zero.
    """

    def apply(directory: Path) -> None:
        data = bytearray((directory / path).read_bytes())
        data[len(data.rstrip(b"\0")) - 1 if place is None else place] ^= 64
        (directory / path).write_bytes(data)

    return apply


def _edit_header(path: Path) -> Callable[[Path], None]:
    """The last digit that the header says."""

    def apply(directory: Path) -> None:
        data = bytearray((directory / path).read_bytes())
        place = max(i for i, byte in enumerate(data[:_PAGE]) if chr(byte).isdigit())
        data[place] = ord("0") + (data[place] - ord("0") + 1) % 10
        (directory / path).write_bytes(data)

    return apply


def _cut(path: Path, num_bytes: int) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        os.truncate(directory / path, num_bytes)

    return apply


def _append(path: Path) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        with (directory / path).open("ab") as file:
            file.write(bytes(range(100)))

    return apply


def _exchange_halves(path: Path) -> Callable[[Path], None]:
    """Of what follows the header, in whole pages if there are some: two blocks change places."""

    def apply(directory: Path) -> None:
        data = (directory / path).read_bytes()
        header, content = data[:_PAGE], data[_PAGE:]
        half = len(content) // 2 // _PAGE * _PAGE or len(content) // 2
        (directory / path).write_bytes(header + content[half:] + content[:half])

    return apply


def _exchange(one: Path, other: Path) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        first, second = directory / one, directory / other
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    return apply
