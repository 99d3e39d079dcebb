"""One layer's file of KV blocks: a header page, then slots of whole pages.

The header is the magic, then JSON, then zeros up to 4096 bytes. Slot i is at 4096 + i * slot_bytes
and holds one block [2, G, block_size, D], raw and little-endian.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import os
import stat
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.buffers import PAGE, aligned_buffer, as_memoryview, round_up
from ollm_core.errors import DoesNotFitError, KVStoreError, OllmError, ReadError
from ollm_core.files.untrusted_json import parse_object

MAGIC = b"OLLMKV\0\1"
VERSION = 1

_DIRECT = getattr(os, "O_DIRECT", 0)
_MAX_IO = 1 << 30  # the kernel caps one call just below 2 GiB
_MAX_KEPT_SLOTS = 1 << 20  # a file may claim to be of any length
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_header(fields: dict[str, Any]) -> bytes:
    """The header page with these fields and the version."""
    text = json.dumps({"version": VERSION, **fields}).encode()
    return (MAGIC + text).ljust(PAGE, b"\0")


def read_header(page: bytes, path: Path) -> dict[str, Any]:
    """The fields of a header page. Raises KVStoreError if it is not one of this version."""
    if len(page) < PAGE or not page.startswith(MAGIC):
        raise KVStoreError(f"{path}: not a KV file")
    try:
        fields = parse_object(page[len(MAGIC) : PAGE].rstrip(b"\0"), strict=True)
    except ValueError as error:
        raise KVStoreError(f"{path}: the header of the KV file is damaged") from error
    version = fields.get("version")
    if version != VERSION:
        raise KVStoreError(f"{path}: KV format version {version}, expected {VERSION}")
    return fields


def open_own(path: Path, flags: int) -> int:
    """Open a regular file of this user, mode 0600 if it is created; never through a link.

    Raises OSError; KVStoreError if it is something else.
    """
    file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(file)
        raise KVStoreError(f"{path}: not a KV file of this user")
    return file


def header_fields(geometry: KVGeometry, fingerprint: str) -> dict[str, Any]:
    """What must be equal for blocks to be of use to another store."""
    return {
        "fingerprint": fingerprint,
        "dtype": str(geometry.dtype).removeprefix("torch."),
        "block_size": geometry.block_size,
    }


def layer_fields(geometry: KVGeometry, fingerprint: str, layer_idx: int) -> dict[str, Any]:
    """The same for one layer."""
    kind = geometry.kinds[layer_idx]
    return header_fields(geometry, fingerprint) | {
        "layer": layer_idx,
        "heads": kind.num_kv_heads,
        "dim": kind.head_dim,
        "window": kind.window,
        "block_bytes": geometry.block_bytes(layer_idx),
    }


def storage_error(error: OSError, path: Path, doing: str) -> OllmError:
    """What to raise for a failed call: DoesNotFitError for a full disk, otherwise ReadError."""
    if error.errno in _FULL:
        return DoesNotFitError(
            f"{path}: {doing} failed: {error.strerror}",
            hint="free space on that disk, or name another directory with --kv-dir (kv_dir)",
        )
    return ReadError(f"{path}: {doing} failed: {error.strerror}")


class LayerFile(Closing):
    """The slots of one layer. Taking and giving back slots is for one thread; reading and writing
    for any.
    """

    def __init__(
        self,
        directory: Path,
        layer_idx: int,
        geometry: KVGeometry,
        fingerprint: str,
        *,
        create: bool = True,
        writable: bool = True,
    ) -> None:
        """Create the file, mode 0600, and write its header, past the page cache where the file
        system allows it. Without `create`, open one that is there: `keep` or `keep_all` must then
        be called, unless it is not `writable`: such a file is only read.

        Raises OSError; KVStoreError if the file that is there is not one for these arguments.
        """
        self.path = directory / f"layer-{layer_idx:05}.kv"
        self.slot_bytes = round_up(geometry.block_bytes(layer_idx))
        self.num_slots = 0
        self._free: set[int] = set()
        flags = os.O_RDWR if writable else os.O_RDONLY
        self._file = open_own(self.path, flags | (os.O_CREAT | os.O_EXCL if create else 0))
        try:
            with suppress(OSError):  # some file systems know no O_DIRECT
                self._set_direct(True)
            header = write_header(layer_fields(geometry, fingerprint, layer_idx))
            page = aligned_buffer(PAGE)
            buffer = as_memoryview(page)
            if create:
                buffer[:] = header
                if self._transfer(os.pwritev, buffer, 0) < PAGE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return
            if self._transfer(os.preadv, buffer, 0) < PAGE or buffer != header:
                raise KVStoreError(f"{self.path}: not the KV file that was expected")
            self.measure()
        except BaseException:
            self.close()
            raise

    @property
    def num_free(self) -> int:
        """Slots that are in the file and not taken."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return PAGE + self.num_slots * self.slot_bytes

    def grow(self, num_slots: int) -> None:
        """Add free slots whose space the disk guarantees. Raises OSError with nothing changed, or
        ReadError if the file has become shorter: growing would fill the gap with zeros.
        """
        if num_slots <= 0:
            return
        size, found = self.num_bytes, os.fstat(self._file).st_size
        if found < size:
            raise self._too_short(found, size)
        try:
            os.posix_fallocate(self._file, size, num_slots * self.slot_bytes)
        except OSError as error:
            os.ftruncate(self._file, size)  # a failed call may leave part of what it got
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            # No guarantee to be had on this file system: a full disk shows when it is written.
            os.ftruncate(self._file, size + num_slots * self.slot_bytes)
        self._free.update(range(self.num_slots, self.num_slots + num_slots))
        self.num_slots += num_slots

    def take(self, num_slots: int) -> list[int]:
        """The lowest free slots, ascending. `grow` has made sure that there are enough."""
        taken = heapq.nsmallest(num_slots, self._free)
        self._free.difference_update(taken)
        return taken

    def keep(self, slots: Set[int]) -> None:
        """Of a file that was there, take these slots, all below `num_slots`; others are free.
        Raises OSError.
        """
        self.num_slots = max(slots, default=-1) + 1
        self._free = set(range(self.num_slots)) - slots
        os.ftruncate(self._file, self.num_bytes)

    def measure(self) -> None:
        """Of a file that was there, look how many slots it has now. Raises OSError."""
        whole_slots = (os.fstat(self._file).st_size - PAGE) // self.slot_bytes
        self.num_slots = min(whole_slots, _MAX_KEPT_SLOTS)

    def keep_all(self) -> None:
        """Of a file that was there, take every slot, and leave the file as it is: somebody may be
        reading any of them.
        """
        self._free = set()

    def give_back(self, slots: Sequence[int]) -> None:
        """Make slots free, and the file shorter if it ends in free ones."""
        self._free.update(slots)
        size = self.num_bytes
        while self.num_slots - 1 in self._free:
            self.num_slots -= 1
            self._free.remove(self.num_slots)
        if self.num_bytes < size:
            os.ftruncate(self._file, self.num_bytes)

    def read(self, slot: int, buffer: memoryview) -> None:
        """Fill a page-aligned `buffer` from `slot` on. Raises ReadError."""
        offset = PAGE + slot * self.slot_bytes
        try:
            done = self._transfer(os.preadv, buffer, offset)
        except OSError as error:
            raise storage_error(error, self.path, "reading") from error
        if done < len(buffer):
            raise self._too_short(offset + done, offset + len(buffer))

    def write(self, slot: int, buffer: memoryview) -> None:
        """Write a page-aligned `buffer` from `slot` on. Raises DoesNotFitError if the disk is full,
        ReadError if it fails.
        """
        try:
            done = self._transfer(os.pwritev, buffer, PAGE + slot * self.slot_bytes)
            if done < len(buffer):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise storage_error(error, self.path, "writing") from error

    def sync(self) -> None:
        """Return when the disk has what was written. Raises OSError."""
        os.fdatasync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _transfer(
        self, call: Callable[[int, list[memoryview], int], int], buffer: memoryview, offset: int
    ) -> int:
        """Bytes done when all is done or `call` gets no further. Falls back from O_DIRECT once."""
        done = 0
        while done < len(buffer):
            try:
                count = call(self._file, [buffer[done : done + _MAX_IO]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct():
                    raise
                self._set_direct(False)
                continue
            if count <= 0:
                break
            done += count
        return done

    def _too_short(self, found: int, expected: int) -> ReadError:
        return ReadError(
            f"{self.path}: ends at byte {found}, expected at least {expected}",
            hint="the file changed while the KV store was open",
        )

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._file, fcntl.F_GETFL) & _DIRECT)

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | (_DIRECT if direct else 0))
