"""The index of cached prefixes: their tokens, and the blocks that hold them, in one file.

A header page as the layer files have, then records, appended. A record is its mark, kind, payload
length and checksum, then the payload. Kind 1 keeps a prefix, kind 2 drops one:

    keep  seconds u64, num_tokens u64, num_layers u32, token ids i32[num_tokens], then per layer
          first u32, count u32, blocks u32[count], checksums u64[count]
    drop  the prefix's key, 16 bytes

All little-endian. A record is there when its checksum is right: a process that is killed while it
appends leaves nothing. The file is hostile input, and so is every number in it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import sys
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ollm_core.contracts.closing import Closing
from ollm_core.device.buffers import PAGE
from ollm_core.errors import KVStoreError
from ollm_core.kv.disk.layer_file import open_own, read_header, write_header

NAME = "prefixes.journal"

_MARK = b"PFX1"
_RECORD = struct.Struct("<4sIQQ")  # mark, kind, payload bytes, checksum of those three and it
_KEPT = struct.Struct("<QQI")
_LAYER = struct.Struct("<II")
_KEEP, _DROP = 1, 2
_KEY_BYTES = 16
MAX_PAYLOAD = 64 << 20
"""Of one record: millions of tokens."""
_SWAP = sys.byteorder == "big"

checksum = xxhash.xxh3_64_intdigest
"""64 bits over bytes; of a block, over its `block_bytes`."""


@dataclass(frozen=True, slots=True)
class LayerBlocks:
    """Where one layer has the tokens of a prefix: `blocks[i]` holds those from `(first + i) *
    block_size` on, and its bytes have `checksums[i]`.
    """

    first: int
    blocks: array[int]
    checksums: array[int]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens that were kept, and where each layer has them. Named by what the tokens are."""

    token_ids: array[int]
    layers: tuple[LayerBlocks, ...]
    seconds: int = field(default_factory=lambda: int(time.time()))
    """When it was kept, since 1970."""

    @property
    def key(self) -> bytes:
        """16 bytes that name the tokens."""
        return hashlib.sha256(_little(self.token_ids)).digest()[:_KEY_BYTES]

    @property
    def num_blocks(self) -> int:
        """Blocks of all layers."""
        return sum(len(layer.blocks) for layer in self.layers)


class Journal(Closing):
    """The journal of one directory. Its owner appends; anybody may read it."""

    def __init__(self, directory: Path, fields: Mapping[str, Any], *, create: bool) -> None:
        """`fields` are the header's: with `create` they are written, else they must be equal.

        Raises OSError; KVStoreError if the file is not a journal for these fields.
        """
        self.path = directory / NAME
        self._fields = dict(fields)
        if create:
            self._file = open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        else:
            self._file = open_own(self.path, os.O_RDWR)
        try:
            if create:
                write_all(self._file, write_header(self._fields), 0)
            elif _header(self._file, self.path) != write_header(self._fields):
                raise KVStoreError(f"{self.path}: made for another model")
            self._size = os.fstat(self._file).st_size
        except BaseException:
            self.close()
            raise

    def append(self, prefix: Prefix) -> None:
        """Keep `prefix`. Raises OSError, with the journal as it was, also if it is too long."""
        payload = pack_prefix(prefix)
        if len(payload) > MAX_PAYLOAD:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._append(_KEEP, payload)

    def drop(self, key: bytes) -> None:
        """Forget the prefix with this key. Raises OSError, with the journal as it was."""
        self._append(_DROP, key)

    def replace(self, prefixes: list[Prefix]) -> None:
        """Hold `prefixes` and nothing else, at once or not at all. Raises OSError."""
        new_path = self.path.with_suffix(".new")
        new_path.unlink(missing_ok=True)
        new = open_own(new_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            records = [_record(_KEEP, pack_prefix(prefix)) for prefix in prefixes]
            size = write_all(new, b"".join([write_header(self._fields), *records]), 0)
            os.fdatasync(new)
            new_path.replace(self.path)
        except BaseException:
            os.close(new)
            new_path.unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file, self._size = new, size

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _append(self, kind: int, payload: bytes) -> None:
        record = _record(kind, payload)
        try:
            write_all(self._file, record, self._size)
        except BaseException:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(record)


def read_journal(directory: Path) -> tuple[dict[str, Any], list[Prefix], int]:
    """The header's fields, the prefixes that are kept, oldest first, and the number of bytes that
    are of no use: records that were dropped, and what is damaged.

    Raises OSError or KVStoreError if there is no journal.
    """
    path = directory / NAME
    file = open_own(path, os.O_RDONLY)
    try:
        fields = read_header(_header(file, path), path)
        kept: dict[bytes, tuple[Prefix, int]] = {}
        for kind, payload in _records(file):
            if kind == _DROP:
                kept.pop(payload, None)
            elif kind == _KEEP and (prefix := unpack_prefix(payload)):
                kept.pop(prefix.key, None)
                kept[prefix.key] = prefix, _RECORD.size + len(payload)
        used = PAGE + sum(size for _, size in kept.values())
        useless = os.fstat(file).st_size - used
        return fields, [prefix for prefix, _ in kept.values()], useless
    finally:
        os.close(file)


def _records(file: int) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of every whole record. One that is damaged is left out, and, where that
    hides how long it is, all after it.
    """
    offset, size = PAGE, os.fstat(file).st_size
    while offset + _RECORD.size <= size:
        try:
            mark, kind, length, expected = _RECORD.unpack(read_all(file, _RECORD.size, offset))
            offset += _RECORD.size
            if mark != _MARK or length > min(size - offset, MAX_PAYLOAD):
                return
            payload = read_all(file, length, offset)
        except EOFError:  # it has just been cut
            return
        offset += length
        if _checksum(kind, payload) == expected:
            yield kind, payload


def _record(kind: int, payload: bytes) -> bytes:
    return _RECORD.pack(_MARK, kind, len(payload), _checksum(kind, payload)) + payload


def _checksum(kind: int, payload: bytes) -> int:
    return checksum(_RECORD.pack(_MARK, kind, len(payload), 0) + payload)


def pack_prefix(prefix: Prefix) -> bytes:
    """The payload that keeps a prefix."""
    num_tokens, num_layers = len(prefix.token_ids), len(prefix.layers)
    parts = [_KEPT.pack(prefix.seconds, num_tokens, num_layers), _little(prefix.token_ids)]
    for layer in prefix.layers:
        parts.append(_LAYER.pack(layer.first, len(layer.blocks)))
        parts += [_little(layer.blocks), _little(layer.checksums)]
    return b"".join(parts)


def unpack_prefix(payload: bytes) -> Prefix | None:
    """The prefix of a payload, or None if its numbers do not add up."""
    try:
        seconds, num_tokens, num_layers = _KEPT.unpack_from(payload)
        offset = _KEPT.size
        token_ids, offset = _numbers("i", payload, offset, num_tokens)
        layers = []
        for _ in range(num_layers):
            first, count = _LAYER.unpack_from(payload, offset)
            blocks, offset = _numbers("I", payload, offset + _LAYER.size, count)
            checksums, offset = _numbers("Q", payload, offset, count)
            layers.append(LayerBlocks(first, blocks, checksums))
    except (struct.error, ValueError):
        return None
    return Prefix(token_ids, tuple(layers), seconds) if offset == len(payload) else None


def _numbers(code: str, payload: bytes, offset: int, count: int) -> tuple[array[int], int]:
    """`count` little-endian numbers, and the offset after them. Raises ValueError."""
    found: array[int] = array(code)
    end = offset + count * found.itemsize
    if end > len(payload):
        raise ValueError("more numbers than there are bytes")
    found.frombytes(payload[offset:end])
    if _SWAP:
        found.byteswap()
    return found, end


def _little(numbers: array[int]) -> bytes:
    if _SWAP:
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _header(file: int, path: Path) -> bytes:
    try:
        return read_all(file, PAGE, 0)
    except EOFError as error:
        raise KVStoreError(f"{path}: not a KV file") from error


def read_all(file: int, num_bytes: int, offset: int) -> bytes:
    """Bytes of a file from `offset` on. Raises OSError; EOFError if there are fewer."""
    parts = []
    while num_bytes:
        part = os.pread(file, num_bytes, offset)
        if not part:
            raise EOFError
        parts.append(part)
        num_bytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def write_all(file: int, data: bytes | memoryview, offset: int) -> int:
    """Returns the offset after `data`. Raises OSError."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count
    return offset
