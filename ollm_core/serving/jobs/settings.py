"""What the answers of a batch depend on, kept beside them until there are all: a run goes on only
with the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ollm_core.checkpoint.safetensors import MAX_CONFIG_BYTES, read_small
from ollm_core.errors import ConfigError, InputError, OllmError
from ollm_core.files.scratch import replace_file
from ollm_core.files.untrusted_json import parse_object
from ollm_core.serving.jobs.files import sync_directory

Settings = Mapping[str, str | int | bool]
"""By name, as a message shows them."""

_WHOLE_BYTES = 64 << 10
_NUM_SAMPLES = 16
_FORMAT = "ollm batch 1"


class SettingsFile:
    """The settings with which an output was begun."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.job")

    def read(self) -> Settings | None:
        """What it says; None where it is not there, or is not sound."""
        if not os.path.lexists(self.path):
            return None
        try:
            found = parse_object(read_small(self.path, MAX_CONFIG_BYTES, ConfigError), strict=True)
        except (ValueError, ConfigError):
            return None
        settings = found.get("settings")
        if found.get("format") != _FORMAT or not isinstance(settings, dict):
            return None
        return settings

    def write(self, settings: Settings) -> None:
        """Keep them: the disk has them when this returns. Raises InputError."""
        content = json.dumps({"format": _FORMAT, "settings": dict(settings)}, indent=1)
        try:
            replace_file(self.path, content.encode())
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from error
        sync_directory(self.path.parent)

    def remove(self) -> None:
        """It need not be there. Raises OllmError."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise OllmError(f"cannot remove {self.path}: {error.strerror}") from error
        sync_directory(self.path.parent)


def differences(begun: Settings, now: Settings) -> str:
    """The settings that are not the same, in one line; empty where all are."""
    names = sorted(begun.keys() | now.keys())
    return ", ".join(
        f"{name} {_shown(begun.get(name))}, now {_shown(now.get(name))}"
        for name in names
        if begun.get(name) != now.get(name)
    )


def model_sample(directory: Path) -> str:
    """32 hex digits that another model in `directory` would not have: of the names and sizes of all
    files, of the small ones whole, and of pieces of the others. To hash all bytes would take as
    long as many a batch. Raises InputError where a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        files = [path for path in directory.iterdir() if path.suffix in _OF_MODELS]
        for path in sorted(files):
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
                if size <= 2 * _NUM_SAMPLES * _WHOLE_BYTES:
                    digest.update(file.read())
                    continue
                for number in range(_NUM_SAMPLES):
                    file.seek((size - _WHOLE_BYTES) * number // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_WHOLE_BYTES))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or directory}: {error.strerror}") from error
    return digest.hexdigest()


_OF_MODELS = (".json", ".jinja", ".safetensors", ".model", ".txt")


def _shown(value: str | int | bool | None) -> str:
    text = "not stated" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
