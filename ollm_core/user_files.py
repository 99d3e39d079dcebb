"""Where files of the user lie that no option names: models, measured rates, KV of the moment."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """`~/.cache/ollm`, or, for a user without a home directory, one in the temporary directory.

    It need not be there, and what is in it may be another user's: who reads it checks that.
    """
    try:
        return Path.home() / ".cache" / "ollm"
    except RuntimeError:  # no HOME, and no entry in the password database
        return Path(tempfile.gettempdir()) / f"ollm-{os.getuid()}"


def is_private(found: os.stat_result) -> bool:
    """Whether that is a directory which only this user may enter."""
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return mine and not found.st_mode & 0o077


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` expanded, and made absolute, so that it holds after a change of directory.
    Links are not resolved.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError:  # ~ of a user without a home directory stays as it is
        path = Path(path)
    return Path(os.path.abspath(path))
