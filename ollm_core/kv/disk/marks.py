"""Marks beside a journal: when a prefix was last used, and whether it is pinned.

Each is an empty file in the home, named by the prefix, so that any process can set it, whoever owns
the home and its journal. One that is lost costs nothing but the order in which prefixes go.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ollm_core.errors import KVStoreError
from ollm_core.kv.disk.layer_file import open_own

_NAME = re.compile(r"prefixes\.([0-9a-f]{32})\.(used|pinned)")


@dataclass(frozen=True, slots=True)
class Marks:
    """Those of one home, by the keys of its prefixes in hex digits."""

    used: dict[str, int] = field(default_factory=dict)
    """Seconds since 1970."""
    pinned: set[str] = field(default_factory=set)


def read_marks(home: Path) -> Marks:
    """Of a home that may be gone."""
    marks = Marks()
    with suppress(OSError):
        for path in home.iterdir():
            found = _NAME.fullmatch(path.name)
            about = path.lstat() if found else None
            if found and about and stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid():
                if found[2] == "used":
                    marks.used[found[1]] = int(about.st_mtime)
                else:
                    marks.pinned.add(found[1])
    return marks


def mark_used(home: Path, key: bytes) -> None:
    """Now. Where it cannot be marked it is not."""
    with suppress(OSError, KVStoreError):
        file = open_own(_path(home, key, "used"), os.O_WRONLY | os.O_CREAT)
        try:
            os.utime(file)
        finally:
            os.close(file)


def pin(home: Path, key: bytes) -> None:
    """Raises OSError or KVStoreError."""
    os.close(open_own(_path(home, key, "pinned"), os.O_WRONLY | os.O_CREAT))


def unpin(home: Path, key: bytes) -> None:
    """Also what is not pinned. Raises OSError."""
    _path(home, key, "pinned").unlink(missing_ok=True)


def is_pinned(home: Path, key: bytes) -> bool:
    """Whether it is."""
    with suppress(OSError):
        return stat.S_ISREG(_path(home, key, "pinned").lstat().st_mode)
    return False


def forget(home: Path, key: bytes) -> None:
    """Of a prefix that is kept no more."""
    for kind in ("used", "pinned"):
        with suppress(OSError):
            _path(home, key, kind).unlink()


def _path(home: Path, key: bytes, kind: str) -> Path:
    return home / f"prefixes.{key.hex()}.{kind}"
