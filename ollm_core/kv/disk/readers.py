"""Readers of a home: processes that read what another one keeps there.

Each holds a shared lock on a file in the home for as long as it reads. Who owns the home first says
in the journal that a prefix is kept no more, then asks `are_there`, and only if nobody is writes
its blocks again or cuts its files: who enters later does not find it. A process that is killed
reads no more, and its lock has gone with it.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from ollm_core.errors import KVStoreError
from ollm_core.kv.disk.layer_file import open_own

NAME = "prefixes.readers"

_TRIES = 20
_WAIT = 0.01
"""Seconds between two: who asks `are_there` keeps others out for less."""


def enter(home: Path) -> int | None:
    """A descriptor: while it is open, what the journal says from now on stays as it is. None if the
    home has just been removed. Raises OSError, also where the file system knows no locks, and
    KVStoreError.
    """
    path = home / NAME
    file = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        if _locked(file, fcntl.LOCK_SH, _TRIES) and os.path.samestat(os.fstat(file), path.lstat()):
            entered, file = file, -1
            return entered
    except FileNotFoundError:
        pass
    finally:
        if file >= 0:
            os.close(file)
    return None


def are_there(home: Path) -> bool:
    """Whether a process reads in `home`, or that cannot be known."""
    try:
        file = open_own(home / NAME, os.O_RDWR)
    except FileNotFoundError:  # none ever did
        return False
    except (OSError, KVStoreError):
        return True
    try:
        return not _locked(file, fcntl.LOCK_EX, 1)
    except OSError:
        return True
    finally:
        os.close(file)


def _locked(file: int, kind: int, tries: int) -> bool:
    for attempt in range(tries):
        if attempt:
            time.sleep(_WAIT)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False
