"""Temporary files and directories, which belong to one process and are removed after it.

The process owns each by flock for as long as it uses it. What a killed process left is owned by
nobody: the next one removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_RANDOM = "[a-z0-9_]{8}"
"""What `tempfile` puts between prefix and suffix."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """A new file or directory, for this user only."""

    path: Path
    descriptor: int
    """Open as long as it is owned."""
    locked: bool
    """False where the file system knows no locks: nobody will then remove it."""


def make_file(directory: Path, prefix: str, suffix: str = "") -> Scratch:
    """A new file, opened for reading and writing. Raises OSError."""

    def make() -> tuple[str, int]:
        descriptor, name = tempfile.mkstemp(suffix, prefix, directory)
        return name, descriptor

    return _owned(make)


def make_directory(parent: Path, prefix: str, suffix: str = "") -> Scratch:
    """A new directory. Raises OSError."""

    def make() -> tuple[str, int]:
        while True:
            name = tempfile.mkdtemp(suffix, prefix, parent)
            with suppress(FileNotFoundError):  # taken for a leftover
                return name, os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    return _owned(make)


def take_over(path: Path) -> int | None:
    """A descriptor that owns what is at `path`, for as long as it is open. None if a process has
    it, it has just been removed, or it is not a file or directory of this user alone. Raises
    OSError.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    with suppress(BlockingIOError):
        if _is_own(os.fstat(descriptor)) and _lock(descriptor) and _is_at(path, descriptor):
            return descriptor
    os.close(descriptor)
    return None


def leftovers(directory: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """What has a name as `make_file` and `make_directory` give it, in use or not."""
    name = re.compile(re.escape(prefix) + _RANDOM + re.escape(suffix))
    with suppress(OSError):
        yield from (path for path in directory.iterdir() if name.fullmatch(path.name))


def reap(paths: Iterable[Path], remove: Callable[[Path], None] = Path.unlink) -> None:
    """`remove` each that no process owns, while it is owned here. What cannot be removed stays."""
    for path in paths:
        with suppress(OSError):
            owned = take_over(path)
            if owned is not None:
                try:
                    remove(path)
                finally:
                    os.close(owned)


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` at once or not at all, for this user only. Raises OSError."""
    prefix, suffix = f".{path.name}.", ".partial"
    reap(leftovers(path.parent, prefix, suffix))
    partial = make_file(path.parent, prefix, suffix)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(partial.descriptor, left) :]
        partial.path.replace(path)
    except BaseException:
        partial.path.unlink(missing_ok=True)
        raise
    finally:
        os.close(partial.descriptor)


def _is_own(found: os.stat_result) -> bool:
    kind = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return kind and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _owned(make: Callable[[], tuple[str, int]]) -> Scratch:
    """Made again if another process takes it for a leftover before it is locked."""
    while True:
        name, descriptor = make()
        with suppress(BlockingIOError):
            locked = _lock(descriptor)
            if _is_at(Path(name), descriptor):
                return Scratch(Path(name), descriptor, locked)
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Own it, or return False where the file system knows no locks. Raises BlockingIOError if
    another process owns it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether it has not been removed, nor anything else put in its place."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False
