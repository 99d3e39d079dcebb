"""Marks on names of rows, in a few dozen bytes each, however long the names are."""

from __future__ import annotations

import hashlib
import os

_SLOT = 16
_LEAST = 64  # slots; a power of two


class IdTable:
    """Marks, a byte for each name. A name is known by 120 bits of a keyed hash: that two of a
    billion names are taken for one has a chance below 1 in 10^18, and nobody can choose them so.
    """

    def __init__(self) -> None:
        self._key = os.urandom(16)
        self._slots = bytearray(_LEAST * _SLOT)  # a hash and its marks; no marks: a free slot
        self._num = 0

    def __len__(self) -> int:
        """Names that have marks."""
        return self._num

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return len(self._slots)

    def marks(self, name: str) -> int:
        """Those of a name; 0 where it has none."""
        return self._slots[self._find(self._hash(name)) + _SLOT - 1]

    def mark(self, name: str, bit: int) -> int:
        """Add a mark, 1 to 128; -> the marks of before."""
        digest = self._hash(name)
        at = self._find(digest)
        before = self._slots[at + _SLOT - 1]
        if not before:
            self._num += 1
            if 3 * self._num * _SLOT > 2 * len(self._slots):
                self._grow()
                at = self._find(digest)
        self._slots[at : at + _SLOT] = digest + bytes([before | bit])
        return before

    def _grow(self) -> None:
        old, self._slots = self._slots, bytearray(2 * len(self._slots))
        for start in range(0, len(old), _SLOT):
            slot = old[start : start + _SLOT]
            if slot[-1]:
                at = self._find(bytes(slot[:-1]))
                self._slots[at : at + _SLOT] = slot

    def _find(self, digest: bytes) -> int:
        """Where the slot of a hash begins, its own or a free one."""
        size = len(self._slots)
        at = int.from_bytes(digest[:8], "little") * _SLOT % size
        while self._slots[at + _SLOT - 1] and self._slots[at : at + _SLOT - 1] != digest:
            at = (at + _SLOT) % size
        return at

    def _hash(self, name: str) -> bytes:
        encoded = name.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(encoded, digest_size=_SLOT - 1, key=self._key).digest()
