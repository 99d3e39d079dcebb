"""Names for fingerprints, for people: what the directory of a model was called when it was last
opened with a prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ollm_core.checkpoint.locate import repository_of
from ollm_core.files.paths import cache_directory
from ollm_core.files.remembered import Remembered

_MOST_ENTRIES = 1024
_MOST_CHARACTERS = 200


def remember_name(fingerprint: str, directory: Path) -> None:
    """Note what the model in a directory is called; where that cannot be kept, nobody is told."""
    name = repository_of(directory) or directory.name
    names = _names()
    if _is_name(name) and names.read().get(fingerprint) != name:
        with suppress(OSError):
            names.add({fingerprint: name})


def known_names() -> Mapping[str, str]:
    """The name of each fingerprint that is known. Two may have the same one."""
    return _names().read()


def _names() -> Remembered:
    return Remembered(cache_directory() / "identity" / "names.json", _is_name, _MOST_ENTRIES)


def _is_name(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= _MOST_CHARACTERS and text.isprintable()
