"""The disk budget of prefix caches: what is least recently used goes, so that new text is kept."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ollm_core.errors import KVStoreError
from ollm_core.kv.disk.admin import remove, remove_states_of, remove_strays, remove_unfinished
from ollm_core.kv.disk.inventory import StoredPrefix, StoredUnfinished, take_inventory
from ollm_core.memory.sizes import format_size

logger = logging.getLogger("ollm")

_LONGEST_WAIT = 30.0
"""Seconds for another process to copy and write what it keeps."""

Drop = Callable[[bytes], bool]
"""Forgets the prefix or unfinished prompt with this key in our own home; returns whether it
has.
"""


@dataclass(slots=True)
class KeptBudget:
    """The most bytes that may be kept in `parent`, for all models together."""

    parent: Path
    limit: int
    _told: bool = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside the `with` no other process makes room or keeps what it has made room for: two at
        once would both count on the same bytes. Raises OSError if it is not our turn for long.
        """
        file = os.open(self.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            end = time.monotonic() + _LONGEST_WAIT
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.01)
            yield
        finally:
            os.close(file)

    def make_room(
        self,
        needed: Callable[[], int],
        home: Path,
        drop: Drop,
        going: Collection[bytes] = (),
    ) -> int:
        """How many bytes may be kept in this `turn`. Until there are as many as `needed` says,
        which is asked again after each, prefixes are removed that are not pinned, least recently
        used first: in `home` by `drop`, in other homes unless a process owns or reads them.
        What in `home` has one of the keys `going` is not counted: it will go.
        """
        leaving = {(home, key) for key in going}
        inventory = take_inventory(self.parent)
        taken = inventory.num_bytes(leaving, claimed=True)
        if taken + needed() > self.limit:
            gone = remove_strays(inventory.states)
            taken -= sum(state.num_bytes for state in gone)
        old: list[StoredPrefix | StoredUnfinished] = [*inventory.prefixes, *inventory.unfinished]
        for one in sorted(old, key=lambda one: one.last_used):
            if taken + needed() <= self.limit:
                break
            if isinstance(one, StoredPrefix):
                stays = one.pinned or (one.directory, one.prefix.key) in leaving
            else:
                stays = (one.directory, one.one.key) in leaving
            if not stays and self._remove(one, home, drop):
                taken = take_inventory(self.parent).num_bytes(leaving, claimed=True)
        return max(self.limit - taken, 0)

    def tell(self, num_kept: int) -> None:
        """Say once that only so many tokens of a text are kept."""
        if not self._told:
            self._told = True
            logger.error(
                "prefix cache: kv_budget (%s) has room for %d tokens of this text, the rest is not "
                "kept. hint: raise --kv-budget, or see `ollm cache list` for what is pinned",
                format_size(self.limit),
                num_kept,
            )

    def _remove(self, one: StoredPrefix | StoredUnfinished, home: Path, drop: Drop) -> bool:
        try:
            if isinstance(one, StoredUnfinished):
                if one.directory == home:
                    return drop(one.one.key)
                return not remove_unfinished([one])
            if one.directory == home:
                dropped = drop(one.prefix.key)
                if dropped:
                    remove_states_of([one])
                return dropped
            return not remove([one])
        except (KVStoreError, OSError) as error:
            logger.info("%s: cannot be removed: %s", one.directory, error)
            return False
