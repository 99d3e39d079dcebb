"""Files of clients, in a directory of the server's own. What names a file is an id that the server
has made; a client's name for it is kept as data, and is no path.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ollm_core.contracts.closing import Closing
from ollm_core.errors import InputError
from ollm_core.files.scratch import replace_file
from ollm_core.files.untrusted_json import parse_object
from ollm_core.server.errors import RefusedRequestError

MAX_LISTED = 10_000
_ID = re.compile(r"(?:file|batch)-[0-9a-f]{24}")
_MAX_FIELDS_BYTES = 1 << 20


def new_id(kind: str) -> str:
    """Of a "file" or a "batch"."""
    return f"{kind}-{secrets.token_hex(12)}"


class FileStore(Closing):
    """Contents and records by id. Used by one process at a time, which it locks out others for."""

    def __init__(self, directory: Path, budget: int) -> None:
        """`budget` is the most bytes of all contents that are added. Raises InputError."""
        self.directory, self._budget = directory, budget
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(f"cannot use {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(
                f"{directory} is used by another server", hint="name another --files-dir"
            ) from None

    def close(self) -> None:
        """Let others use it. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # Contents.

    def content(self, file_id: str) -> Path:
        """Where the content of a file is, or will be. Raises RefusedRequestError for what is no
        id.
        """
        if not _ID.fullmatch(file_id):
            raise _unknown()
        return self.directory / file_id

    def create(self, file_id: str) -> BinaryIO:
        """A new content, to be written."""
        descriptor = os.open(
            self.content(file_id), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        return os.fdopen(descriptor, "wb")

    @property
    def room(self) -> int:
        """Bytes that may still be added."""
        sizes = (path.stat().st_size for path in self.directory.glob("file-*") if path.is_file())
        return max(self._budget - sum(sizes), 0)

    # Records.

    def write(self, record: Mapping[str, Any]) -> None:
        """Keep a record by its id."""
        data = json.dumps(dict(record)).encode()
        replace_file(self._record(str(record["id"])), data)

    def read(self, record_id: str, kind: str) -> dict[str, Any]:
        """The record of a "file" or a "batch". Raises RefusedRequestError if there is none."""
        path = self._record(record_id)
        try:
            with path.open("rb") as opened:
                found = parse_object(opened.read(_MAX_FIELDS_BYTES), strict=True)
        except (OSError, ValueError):
            raise _unknown() from None
        if found.get("id") != record_id or not record_id.startswith(f"{kind}-"):
            raise _unknown()
        return found

    def records(self, kind: str) -> Iterator[dict[str, Any]]:
        """Those of a "file" or a "batch", the newest first."""
        found = []
        for path in self.directory.glob(f"{kind}-*.json"):
            with suppress(RefusedRequestError):
                found.append(self.read(path.name.removesuffix(".json"), kind))
        found.sort(key=lambda one: (-int(one.get("created_at", 0)), str(one["id"])))
        return iter(found[:MAX_LISTED])

    def remove(self, file_id: str) -> None:
        """A file and its record. Raises RefusedRequestError if there is none."""
        self.read(file_id, "file")
        for path in (self._record(file_id), self.content(file_id)):
            path.unlink(missing_ok=True)

    def _record(self, record_id: str) -> Path:
        return self.content(record_id).with_name(f"{record_id}.json")


def file_record(file_id: str, purpose: str, name: str, size: int) -> dict[str, Any]:
    """In OpenAI's form."""
    return {
        "id": file_id,
        "object": "file",
        "bytes": size,
        "created_at": int(time.time()),
        "filename": name,
        "purpose": purpose,
        "status": "processed",
    }


def _unknown() -> RefusedRequestError:
    return RefusedRequestError(404, "there is no such file or batch here", code="not_found")
