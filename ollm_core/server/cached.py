"""What is cached of texts that were answered: names, tokens and bytes. No text, and no path."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ollm_core.errors import OllmError
from ollm_core.kv.disk.borrowed import common
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.serving.prefixes import as_tensor
from ollm_core.serving.session import Session

MAX_TOLD = 64
"""Of each place, those that were used last."""
_DISK_SECONDS = 10.0
"""Between two times that the disk is looked at."""
_NAME_CHARS = 8


class CachedTexts:
    """Of one session, and of one directory of kept prefixes."""

    def __init__(
        self, session: Session, num_bytes: Callable[[int], int], kv_dir: Path | None
    ) -> None:
        """`num_bytes` are those of a text of so many tokens."""
        self._session, self._num_bytes, self._kv_dir = session, num_bytes, kv_dir
        self._names: dict[tuple[int, int], str] = {}
        self._on_disk: list[dict[str, Any]] = []
        self._looked = -_DISK_SECONDS

    def num_kept(self, token_ids: Sequence[int]) -> int:
        """How many of the first tokens of a prompt this run has read before."""
        prompt = as_tensor(token_ids[:-1])
        return max((common(ids, prompt) for _, ids in self._session.cached()), default=0)

    def read(self) -> list[dict[str, Any]]:
        """Those at hand, then those that a later start finds too; each the newest first. Takes
        milliseconds; from one thread at a time.
        """
        at_hand = self._session.cached()[::-1][:MAX_TOLD]
        names = {key: self._names.get(key) or _name(ids.numpy().tobytes()) for key, ids in at_hand}
        self._names = names
        told = [
            _told(names[key], len(ids), self._num_bytes(len(ids)), "this run")
            for key, ids in at_hand
        ]
        return [*told, *self._disk()]

    def _disk(self) -> list[dict[str, Any]]:
        if self._kv_dir is not None and time.monotonic() >= self._looked + _DISK_SECONDS:
            try:
                prefixes = take_inventory(self._kv_dir).prefixes[::-1][:MAX_TOLD]
            except (OllmError, OSError):
                prefixes = []
            self._on_disk = [
                _told(one.id[:_NAME_CHARS], len(one.prefix.token_ids), one.num_bytes, "later runs")
                for one in prefixes
            ]
            self._looked = time.monotonic()
        return self._on_disk


def _name(token_ids: bytes) -> str:
    """As `ollm cache list` names them."""
    return hashlib.sha256(token_ids).hexdigest()[:_NAME_CHARS]


def _told(name: str, num_tokens: int, num_bytes: int, place: str) -> dict[str, Any]:
    return {"name": name, "tokens": num_tokens, "bytes": num_bytes, "place": place}
