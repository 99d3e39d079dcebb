"""How the checks of a KV store get one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from ollm_conformance.parts.base import PartSuite
from ollm_conformance.parts.kv_machine import OpenStore
from ollm_conformance.parts.lists import KVShape
from ollm_core import KVStore, MemoryAccount

SMALL = KVShape()


class KVStoreSuite(PartSuite):
    """Base of the groups. Test authors subclass KVStoreConformance, which has them all."""

    num_examples = 25
    """Sequences of calls that the state machine tries."""
    slides: ClassVar[bool] = True
    """Whether layers with a window let go of what is before it."""

    @classmethod
    def open_store(cls, shape: KVShape, account: MemoryAccount, directory: Path) -> KVStore:
        """A new store for `shape` that computes on the CPU; `shape.kinds` says what each layer
        remembers.

        All its memory is reserved in `account`; its files, if it has any, are in `directory`, which
        is there and empty.
        """
        raise NotImplementedError

    @classmethod
    @contextmanager
    def opened(cls, shape: KVShape = SMALL) -> Iterator[OpenStore]:
        """A store and what it uses; it is closed afterwards, twice."""
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            account = MemoryAccount("memory", 1 << 30)
            with cls.open_store(shape, account, directory) as store:
                yield OpenStore(store, account, directory, shape, account.used)
            store.close()
