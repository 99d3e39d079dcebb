"""Files that set options: the project's `ollm.toml`, and the user's own. Knows where they lie and
what TOML they hold, and nothing of options.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ollm_core.errors import InputError, one_line

PROJECT_FILE = "ollm.toml"
USER_FILE = "config.toml"
MAX_BYTES = 64 << 10

_HEADER = re.compile(r"\[\s*([\w-]+)\s*\]\s*(?:#.*)?")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """One that is there."""

    path: Path
    is_project: bool
    """Whether it came with a directory, and may be anybody's."""
    private: bool
    """Whether no other user can read it."""
    text: str

    def entries(self) -> Iterator[Entry]:
        """What it sets, in order. Raises InputError for what is no TOML."""
        try:
            parsed = tomllib.loads(self.text)
        except RecursionError:
            raise InputError(f"{self.path}: TOML nested too deeply") from None
        except ValueError as error:
            raise InputError(f"{self.path}: not TOML: {one_line(error)}") from error
        for key, value in parsed.items():
            if isinstance(value, dict):
                yield from (self._entry(key, name, inner) for name, inner in value.items())
                if not value:
                    yield self._entry(key, "", None)
            else:
                yield self._entry("", key, value)

    def _entry(self, table: str, key: str, value: Any) -> Entry:
        line = _line_of(self.text, table, key)
        return Entry(self, table, key, value, f"{self.path}:{line}" if line else str(self.path))


@dataclass(frozen=True, slots=True)
class Entry:
    """One key with its value."""

    file: ConfigFile
    table: str
    """The verb that it is for; empty for all of them."""
    key: str
    """Empty where a table has none."""
    value: Any
    where: str
    """The file, with the line where that is known."""


def config_files() -> list[ConfigFile]:
    """The user's file, then the project's, which goes over it; those that are there. Raises
    InputError for one that cannot be read.
    """
    user, project = user_file(), project_file()
    found = [_read(user, is_project=False)] if user and os.path.lexists(user) else []
    return found + ([_read(project, is_project=True)] if project else [])


def user_file() -> Path | None:
    """Where the user's file is or would be, as the platform has it: `$XDG_CONFIG_HOME/ollm`,
    `~/.config/ollm`, or `~/Library/Application Support/ollm`. None for a user without a home.
    """
    directory = Path(click.get_app_dir("ollm"))
    return directory / USER_FILE if directory.is_absolute() else None


def project_file() -> Path | None:
    """The `ollm.toml` of the current directory, or else the nearest one above it. The search ends
    at the top of a git repository, at the home directory, and at the first directory in which other
    users can write, or that is another user's.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return None
    for directory in (here, *here.parents):
        if directory != here and not _is_own(directory):
            return None
        if os.path.lexists(directory / PROJECT_FILE):
            return directory / PROJECT_FILE
        if os.path.lexists(directory / ".git") or directory == Path(os.path.expanduser("~")):
            return None
    return None


def _is_own(directory: Path) -> bool:
    found = directory.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH


def _read(path: Path, *, is_project: bool) -> ConfigFile:
    """Raises InputError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path}: need a regular file")
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: need at most {MAX_BYTES} bytes, have more")
    foreign = found.st_uid not in (0, os.geteuid())
    if not is_project and (foreign or found.st_mode & stat.S_IWOTH):
        raise InputError(
            f"{path}: another user can change it", hint=f"make it yours: chmod go-w {path}"
        )
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    return ConfigFile(path, is_project, not found.st_mode & 0o044, text)


def _line_of(text: str, table: str, key: str) -> int | None:
    """The line that sets a key as people write it: one to a line, below its table's header."""
    current, wanted = "", re.compile(rf"""(["']?){re.escape(key)}\1\s*=""")
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.fullmatch(line.strip()):
            current = header[1]
            if current == table and not key:
                return number
        elif current == table and key and wanted.match(line.strip()):
            return number
    return None
