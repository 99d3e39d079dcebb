"""What other processes keep: found in their homes, and read there by reference."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import KVGeometry
from ollm_core.errors import KVStoreError
from ollm_core.kv.disk import readers
from ollm_core.kv.disk.directory import find_homes, home_fields, sound_prefixes
from ollm_core.kv.disk.journal import NAME, Prefix, read_journal
from ollm_core.kv.disk.layer_file import VERSION, LayerFile

logger = logging.getLogger("ollm")


class BorrowedHome(Closing):
    """A home that this process reads, and another one may own. Nothing in it is written; what is
    kept in it stays as it is until this is closed.
    """

    def __init__(
        self, directory: Path, lock: int, files: Sequence[LayerFile], geometry: KVGeometry
    ) -> None:
        """Made by `borrow_home`."""
        self.directory = directory
        self.files = files
        """One per layer, open for reading."""
        self._lock = lock
        self._geometry = geometry

    def prefixes(self) -> list[Prefix]:
        """What is kept there now, oldest first. It stays what it is, also if it is then kept no
        more.
        """
        try:
            _, found, _ = read_journal(self.directory)
            for file in self.files:
                file.measure()
        except (OSError, KVStoreError) as error:
            logger.info("%s: its prefix cache cannot be read: %s", self.directory, error)
            return []
        return sound_prefixes(found, self.files, self._geometry)

    def close(self) -> None:
        if self._lock >= 0:
            for file in self.files:
                file.close()
            os.close(self._lock)
            self._lock = -1


def borrow_home(directory: Path, geometry: KVGeometry, fingerprint: str) -> BorrowedHome | None:
    """The home `directory`, whoever owns it, if it is of the same model."""
    with ExitStack() as stack:
        try:
            lock = readers.enter(directory)
            if lock is None:
                return None
            stack.callback(os.close, lock)
            fields, _, _ = read_journal(directory)
            if fields != {"version": VERSION, **home_fields(geometry, fingerprint)}:
                return None
            files = [
                stack.enter_context(
                    LayerFile(directory, i, geometry, fingerprint, create=False, writable=False)
                )
                for i in range(geometry.num_layers)
            ]
        except (OSError, KVStoreError) as error:
            logger.info("%s: its prefix cache cannot be read: %s", directory, error)
            return None
        stack.pop_all()
        return BorrowedHome(directory, lock, files, geometry)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a journal said when it was last read."""

    signature: tuple[int, int, int]
    token_ids: list[Tensor]
    """int32 [T] each."""


class OtherHomes:
    """What the homes in a directory keep for one model. A journal is read again when it has
    changed.
    """

    def __init__(self, parent: Path, geometry: KVGeometry, fingerprint: str) -> None:
        self._parent = parent
        self._fields = {"version": VERSION, **home_fields(geometry, fingerprint)}
        self._kept: dict[Path, _Kept] = {}

    def matches(self, token_ids: Tensor, without: Collection[Path]) -> list[tuple[int, Path]]:
        """How many of `token_ids`, int32 [T], each home but those has, and the home; the most
        first.
        """
        found = []
        known, self._kept = self._kept, {}
        for path in find_homes(self._parent):
            with suppress(OSError, KVStoreError):
                self._kept[path] = kept = self._read(path, known.get(path))
                if path not in without and kept.token_ids:
                    found.append((max(common(one, token_ids) for one in kept.token_ids), path))
        return sorted(found, key=lambda one: one[0], reverse=True)

    def _read(self, path: Path, known: _Kept | None) -> _Kept:
        about = (path / NAME).lstat()
        signature = about.st_ino, about.st_size, about.st_mtime_ns
        if known is not None and known.signature == signature:
            return known
        fields, prefixes, _ = read_journal(path)
        mine = prefixes if fields == self._fields else []
        return _Kept(signature, [tokens_of(one) for one in mine if one.token_ids])


def tokens_of(prefix: Prefix) -> Tensor:
    """int32 [T]."""
    return torch.frombuffer(prefix.token_ids, dtype=torch.int32)


def common(one: Tensor, other: Tensor) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(one), len(other))
    different = (one[:shorter] != other[:shorter]).nonzero()
    return int(different[0]) if len(different) else shorter


def contents_of(prefixes: Sequence[Prefix]) -> Iterator[tuple[int, int, int]]:
    """Layer, slot and checksum of every block that `prefixes` keep."""
    for prefix in prefixes:
        for layer_idx, layer in enumerate(prefix.layers):
            for block, checksum in zip(layer.blocks, layer.checksums, strict=True):
                yield layer_idx, block, checksum
