"""Paths: what a path in an option means, and where files go that no option names."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

from ollm_core.errors import InputError

Made = TypeVar("Made")

_TRIES = 20


def cache_directory() -> Path:
    """`~/.cache/ollm`, or, for a user without a home directory, one in the temporary directory.

    The latter is made, for this user only; InputError is raised if somebody else has its name.
    The former need not be there.
    """
    try:
        return Path.home() / ".cache" / "ollm"
    except RuntimeError:  # no HOME, and no entry in the password database
        return _private_directory(Path(tempfile.gettempdir()) / f"ollm-{os.geteuid()}")


def is_private(found: os.stat_result) -> bool:
    """Whether that is a directory which only this user may enter."""
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return mine and not found.st_mode & 0o077


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` expanded, and made absolute, so that it holds after a change of directory.
    Links are not resolved. Raises InputError for what is no path.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"{path!r} is not a path", hint="give a str or a pathlib.Path")
    try:
        return Path(os.path.abspath(os.path.expanduser(text)))
    except FileNotFoundError as error:
        raise InputError(f"{text} is not a path: the current directory is gone") from error


def check_directory(path: Path, hint: str) -> None:
    """Raise InputError if something is at `path`, or in the way to it, that is not a directory."""
    reason = "is not a directory"
    try:
        if path.is_dir():
            return
        path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        reason = f"cannot be a directory: {error.strerror}"
    raise InputError(f"{path} {reason}", hint=hint)


def check_writable_file(path: Path) -> None:
    """Raise InputError unless a file can be written at `path`. Leaves all as it was."""
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
    with _writing_to(path):
        try:
            os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            os.close(os.open(path, flags))
        else:
            path.unlink()


def check_writable_directory(path: Path) -> None:
    """Raise InputError unless files can be made in the directory `path`, which need not be there.
    Leaves all as it was; an empty directory may stay if several look at once.
    """

    def check() -> None:
        missing = takewhile(lambda one: not os.path.isdir(one), [path, *path.parents])
        with ExitStack() as made:
            for directory in reversed(list(missing)):
                directory.mkdir(0o700, exist_ok=True)
                made.callback(_remove_empty, directory)
            os.rmdir(tempfile.mkdtemp(dir=path))

    with _writing_to(path):
        retrying(check)


def retrying(make: Callable[[], Made]) -> Made:
    """What `make` returns. It is tried again where another process removes a directory that it has
    just found, as `check_writable_directory` does. Raises OSError.
    """
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return make()
    return make()


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):  # another process has found it, too
        directory.rmdir()


def _private_directory(path: Path) -> Path:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    if not is_private(path.lstat()):
        raise InputError(f"{path} is not a private directory of this user", hint="set HOME")
    return path


@contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    """Says in one line what the system refused."""
    try:
        yield
    except OSError as error:
        taken = isinstance(error, FileExistsError)
        reason = "it is not a directory" if taken else error.strerror
        raise InputError(f"cannot write to {path}: {reason}") from error
