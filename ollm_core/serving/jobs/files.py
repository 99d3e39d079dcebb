"""The files of a batch: rows that are read once and never held, answers that stay once written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollm_core.contracts.closing import Closing
from ollm_core.errors import InputError, OllmError
from ollm_core.files.untrusted_json import parse_object

MAX_LINE_BYTES = 32 << 20
_READ_BYTES = 64 << 10
_GO_ON = "the same command goes on with the rest"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, without its end."""

    number: int
    """From 1."""
    content: bytes | None
    """None: it is longer than MAX_LINE_BYTES."""
    end: int
    """Where the next one begins, in bytes."""
    is_whole: bool
    """Whether its end is there."""


class InputFile(Closing):
    """The rows of a batch. Stays open, so that nobody can replace what is being read."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where there is no file that can be read twice."""
        self._path = path
        try:
            self._file: int = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot_read(path, error) from error
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self.close()
            raise InputError(
                f"{path} is not a regular file", hint="rows are read twice: write them to a file"
            )
        self.digest = ""
        """Of all that was read, by the last walk that came to the end."""

    @property
    def state(self) -> os.stat_result:
        """Of the open file."""
        return os.fstat(self._file)

    def lines(self) -> Iterator[Line]:
        """All lines that are not blank, from the first. Raises OllmError."""
        digest = hashlib.blake2b(digest_size=16)

        def read(offset: int) -> bytes:
            try:
                found = os.pread(self._file, _READ_BYTES, offset)
            except OSError as error:
                raise _cannot_read(self._path, error) from error
            digest.update(found)
            return found

        for line in _lines(read):
            content = line.content
            if line.number == 1 and content is not None:
                content = content.removeprefix(b"\xef\xbb\xbf")
            if content is None or content.strip():
                yield Line(line.number, content, line.end, line.is_whole)
        self.digest = digest.hexdigest()

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class AnswerFile(Closing):
    """A file of answers that one process appends to, a line at a time, each synced to the disk."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it, and leaves what it has as it is. Raises InputError where it cannot be
        written, or another process does.
        """
        self.path = path
        self._file = -1
        while True:
            self._open()
            if self._is_there():
                break
            self.close()  # another run has just removed it, empty
        self._end = self.state.st_size

    @property
    def state(self) -> os.stat_result:
        """Of the open file."""
        return os.fstat(self._file)

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return self._file >= 0

    @property
    def is_empty(self) -> bool:
        """Whether it has no byte."""
        return self.state.st_size == 0

    def answers(self) -> Iterator[dict[str, Any]]:
        """The objects of all whole lines. Afterwards `mend` cuts off a torn last one. Raises
        InputError for a line that is no answer of a batch.
        """

        def read(offset: int) -> bytes:
            try:
                return os.pread(self._file, _READ_BYTES, offset)
            except OSError as error:
                raise _cannot_read(self.path, error) from error

        end = 0
        for line in _lines(read):
            if not line.is_whole:
                break
            try:
                found = parse_object(line.content or b"")
                if not isinstance(found["custom_id"], str | None):
                    raise ValueError
            except (ValueError, KeyError):
                raise InputError(
                    f"{self.path}: line {line.number} is not an answer of a batch",
                    hint="name another file, or remove that line",
                ) from None
            end = line.end
            yield found
        self._end = end

    def mend(self) -> None:
        """Cut off what follows the last whole line, as a power cut or a full disk leaves it. Raises
        OllmError.
        """
        if self.state.st_size > self._end:
            try:
                os.ftruncate(self._file, self._end)
                os.fsync(self._file)
            except OSError as error:
                raise self._failed(error) from error

    def append(self, answer: Mapping[str, Any]) -> None:
        """Add a line, and return when the disk has it. Raises OllmError, with no part of the line
        left behind.
        """
        line = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        if not self.state.st_nlink:
            raise OllmError(f"{self.path} was removed while it was written", hint=_GO_ON)
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except BaseException as error:
            if (
                isinstance(error, OSError) or left
            ):  # a whole line that an interrupt has met may stay
                with suppress(OSError):  # or else the next run does it
                    os.ftruncate(self._file, self._end)
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise
        finally:
            self._end = self.state.st_size

    def remove_if_empty(self) -> None:
        """Leave no file without a line."""
        if self.is_empty and self.state.st_nlink:
            with suppress(OSError):
                self.path.unlink()

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(self.state.st_mode):
                raise InputError(f"{self.path} is not a regular file", hint="name another one")
            self._lock()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path}: another run is writing there", hint="wait for it to end"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise InputError(f"cannot lock {self.path}: {error.strerror}") from error

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), self.state)
        except OSError:
            return False

    def _failed(self, error: OSError) -> OllmError:
        return OllmError(f"cannot write to {self.path}: {error.strerror}", hint=_GO_ON)


def sync_directory(path: Path) -> None:
    """Let the disk know the names in a directory, where its file system can."""
    with suppress(OSError):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _lines(read: Callable[[int], bytes]) -> Iterator[Line]:
    """The lines of what `read(offset)` gives, piece by piece, to its end."""
    number, offset, held, is_long = 1, 0, bytearray(), False
    while piece := read(offset):
        offset += len(piece)
        begin = 0
        while (end := piece.find(b"\n", begin)) >= 0:
            is_long = is_long or len(held) + end - begin > MAX_LINE_BYTES
            content = None if is_long else bytes(held) + piece[begin:end]
            yield Line(number, content, offset - len(piece) + end + 1, is_whole=True)
            held.clear()
            number, begin, is_long = number + 1, end + 1, False
        is_long = is_long or len(held) + len(piece) - begin > MAX_LINE_BYTES
        if is_long:
            held.clear()
        else:
            held += piece[begin:]
    if held or is_long:
        yield Line(number, None if is_long else bytes(held), offset, is_whole=False)


def _cannot_read(path: Path, error: OSError) -> OllmError:
    return InputError(f"cannot read {path}: {error.strerror}")
