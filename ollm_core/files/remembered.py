"""Short texts by name, remembered for this user from one process to the next."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from ollm_core.files.paths import is_private
from ollm_core.files.scratch import replace_file
from ollm_core.files.untrusted_json import parse_object

_MOST_BYTES = 1 << 20


class Remembered:
    """A file of texts by name. What another user may have written is not believed."""

    def __init__(self, path: Path, is_sound: Callable[[object], bool], most: int) -> None:
        """The file at `path`, in a directory of this user alone. Texts that are not `is_sound` are
        left out. Of more than `most` the oldest are forgotten.
        """
        self.path = path
        self._is_sound = is_sound
        self._most = most

    def read(self) -> dict[str, str]:
        """All texts, oldest first; none where the file is not ours alone, or not sound."""
        try:
            if not is_private(self.path.parent.lstat()):
                return {}
            file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(file, "rb") as opened:
                found = os.fstat(file)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                    return {}
                if found.st_mode & 0o022 or found.st_size > _MOST_BYTES:
                    return {}
                entries = parse_object(opened.read(_MOST_BYTES), strict=True)
        except (OSError, ValueError):
            return {}
        return {name: text for name, text in entries.items() if self._is_sound(text)}

    def add(self, new: Mapping[str, str]) -> None:
        """Put `new` after what is there now. Of two processes that do so at the same moment, one
        may be forgotten. Raises OSError.
        """
        directory = self.path.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(directory.lstat()):
            raise PermissionError("it is not a private directory of this user")
        old = {name: text for name, text in self.read().items() if name not in new}
        entries = list({**old, **new}.items())[-self._most :]
        replace_file(self.path, json.dumps(dict(entries)).encode())
