"""Keys and values on disk: one file per layer, blocks in slots, written behind and read ahead.

A file is a header page and slots of whole pages, raw and little-endian. Nothing in it is
executable. Only tails, blocks on their way to the disk and two staging buffers are in memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from ollm_core.buffers import PAGE, aligned_buffer, as_memoryview, round_up
from ollm_core.errors import DoesNotFitError, KVStoreError, OllmError, ReadError
from ollm_core.interfaces import TierBytes
from ollm_core.kv.blocks import BlockKVStore, BlockStorage, KVGeometry
from ollm_core.memory import MemoryAccount, format_size

MAGIC = b"OLLMKV\0\1"
FORMAT_VERSION = 1
_STAGING_BYTES = 4 << 20
_MAX_PENDING = 8


class DiskKVStore(BlockKVStore):
    """Sealed blocks in files in a directory of its own, which `close` removes. The rest is host
    memory.
    """

    def __init__(
        self, geometry: KVGeometry, account: MemoryAccount, directory: Path, fingerprint: str
    ) -> None:
        """`account` is the host's; `fingerprint` names the model.

        Raises KVStoreError if nothing can be made in `directory`, DoesNotFitError without room.
        """
        super().__init__(geometry, _DiskStorage(geometry, account, directory, fingerprint))


@dataclass(eq=False, slots=True)
class _File:
    """One layer's file and which of its slots are in use."""

    path: Path
    number: int
    num_taken: int = 0
    """Slots for which the file has room and an owner, in use or promised."""
    num_bytes: int = PAGE
    next_slot: int = 0
    free_slots: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Run:
    """Slots that lie together, read in one call; or one block that is not written yet."""

    first_slot: int
    num_slots: int
    pending: Tensor | None = None


class _DiskStorage(BlockStorage):
    def __init__(
        self, geometry: KVGeometry, account: MemoryAccount, directory: Path, fingerprint: str
    ) -> None:
        self._geometry = geometry
        self._account = account
        self._slot_bytes = round_up(geometry.block_bytes)
        self._staging_bytes = max(_STAGING_BYTES // self._slot_bytes, 1) * self._slot_bytes
        self._fixed_bytes = 2 * self._staging_bytes + _MAX_PENDING * self._slot_bytes
        self._num_tails = 0
        self._bytes_read = 0
        self._files: list[_File] = []
        self._buffers: dict[int, Tensor] = {}
        """The slot of memory of each tail, by its address."""
        self._spare_tails: list[Tensor] = []
        self._spare_staging: list[Tensor] = []
        self._pending: dict[tuple[int, int], tuple[Future[None], Tensor]] = {}
        self._directory: Path | None = None
        account.reserve("kv staging", self._fixed_bytes)
        try:
            self._directory = _make_directory(directory)
            for layer_idx in range(geometry.num_layers):
                self._files.append(self._make_file(layer_idx, fingerprint))
        except BaseException:
            self._remove()
            account.release("kv staging", self._fixed_bytes)
            raise
        self._writer = ThreadPoolExecutor(1, "ollm-kv-writer")
        self._reader = ThreadPoolExecutor(1, "ollm-kv-reader")

    def cost(self, num_blocks: int, num_tails: int) -> TierBytes:
        return TierBytes(host=num_tails * self._slot_bytes, disk=num_blocks * self._slot_bytes)

    def take(self, blocks_per_layer: Sequence[int], num_tails: int) -> None:
        self._account.reserve("kv", num_tails * self._slot_bytes)
        grown: list[tuple[_File, int]] = []
        try:
            for file, count in zip(self._files, blocks_per_layer, strict=True):
                needed = PAGE + (file.num_taken + count) * self._slot_bytes
                if needed > file.num_bytes:
                    grown.append((file, file.num_bytes))
                    os.posix_fallocate(file.number, file.num_bytes, needed - file.num_bytes)
                    file.num_bytes = needed
        except OSError as error:
            for file, num_bytes in grown:
                os.ftruncate(file.number, num_bytes)
                file.num_bytes = num_bytes
            self._account.release("kv", num_tails * self._slot_bytes)
            raise self._no_room(error, sum(blocks_per_layer) * self._slot_bytes) from error
        for file, count in zip(self._files, blocks_per_layer, strict=True):
            file.num_taken += count
        self._num_tails += num_tails

    def give(self, blocks_per_layer: Sequence[int], num_tails: int) -> None:
        for file, count in zip(self._files, blocks_per_layer, strict=True):
            file.num_taken -= count
        self._num_tails -= num_tails
        self._account.release("kv", num_tails * self._slot_bytes)

    def open_tail(self) -> Tensor:
        buffer = self._spare_tails.pop() if self._spare_tails else aligned_buffer(self._slot_bytes)
        tail = self._as_block(buffer)
        self._buffers[tail.data_ptr()] = buffer
        return tail

    def drop_tail(self, tail: Tensor) -> None:
        self._spare_tails.append(self._buffers.pop(tail.data_ptr()))

    def seal(self, layer_idx: int, tail: Tensor) -> object:
        self._reap()
        file = self._files[layer_idx]
        if file.free_slots:
            slot = file.free_slots.pop()
        else:
            slot, file.next_slot = file.next_slot, file.next_slot + 1
        buffer = self._buffers[tail.data_ptr()]
        future = self._writer.submit(self._write, file, slot, buffer)
        self._pending[layer_idx, slot] = future, tail
        return slot

    def read(self, layer_idx: int, handles: Sequence[object]) -> Iterator[Tensor]:
        runs = self._runs(layer_idx, cast("Sequence[int]", handles))
        if not runs:
            return
        staging = [self._take_staging(), self._take_staging()]
        ahead: Future[None] | None = None
        try:
            for i, run in enumerate(runs):
                if run.pending is not None:
                    yield run.pending.to(self._geometry.device)
                    continue
                buffer = staging[i % 2]
                if ahead is None:
                    ahead = self._reader.submit(self._read_run, layer_idx, run, buffer)
                ahead.result()
                ahead = None
                following = runs[i + 1] if i + 1 < len(runs) else None
                if following is not None and following.pending is None:
                    target = staging[(i + 1) % 2]
                    ahead = self._reader.submit(self._read_run, layer_idx, following, target)
                for slot in range(run.num_slots):
                    yield self._as_block(buffer[slot * self._slot_bytes :]).to(
                        self._geometry.device
                    )
        finally:
            if ahead is not None:
                with contextlib.suppress(OllmError):
                    ahead.result()
            self._spare_staging += staging

    def free(self, layer_idx: int, handle: object) -> None:
        slot = cast("int", handle)
        pending = self._pending.pop((layer_idx, slot), None)
        if pending is not None:
            pending[0].exception()  # wait: the slot may be written again
            self.drop_tail(pending[1])
        self._files[layer_idx].free_slots.append(slot)

    def tier_bytes(self) -> TierBytes:
        disk = sum(file.num_bytes for file in self._files)
        return TierBytes(host=self._fixed_bytes + self._num_tails * self._slot_bytes, disk=disk)

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def close(self) -> None:
        if self._directory is None:
            return
        self._writer.shutdown()
        self._reader.shutdown()
        self._pending.clear()
        self._buffers.clear()
        self._spare_tails.clear()
        self._spare_staging.clear()
        self._remove()
        self._account.release("kv staging", self._fixed_bytes)

    def _reap(self) -> None:
        """Take back the buffers of finished writes; wait where too many are under way."""
        for key, (future, tail) in list(self._pending.items()):
            if not future.done() and len(self._pending) < _MAX_PENDING:
                break
            error = future.exception()
            del self._pending[key]
            self.drop_tail(tail)
            if error is not None:
                raise error

    def _runs(self, layer_idx: int, slots: Sequence[int]) -> list[_Run]:
        longest = self._staging_bytes // self._slot_bytes
        runs: list[_Run] = []
        for slot in slots:
            pending = self._pending.get((layer_idx, slot))
            last = runs[-1] if runs else None
            if pending is not None:
                runs.append(_Run(slot, 1, pending[1]))
            elif (
                last
                and last.pending is None
                and slot == last.first_slot + last.num_slots
                and last.num_slots < longest
            ):
                runs[-1] = _Run(last.first_slot, last.num_slots + 1)
            else:
                runs.append(_Run(slot, 1))
        return runs

    def _take_staging(self) -> Tensor:
        return (
            self._spare_staging.pop()
            if self._spare_staging
            else aligned_buffer(self._staging_bytes)
        )

    def _as_block(self, buffer: Tensor) -> Tensor:
        data = buffer[: self._geometry.block_bytes]
        return data.view(self._geometry.dtype).view(self._geometry.block_shape)

    def _write(self, file: _File, slot: int, buffer: Tensor) -> None:
        memory, offset, done = as_memoryview(buffer), PAGE + slot * self._slot_bytes, 0
        while done < len(memory):
            try:
                count = os.pwritev(file.number, [memory[done:]], offset + done)
            except OSError as error:
                raise self._no_room(error, len(memory)) from error
            if count <= 0:
                raise self._no_room(OSError(errno.ENOSPC, "no space left"), len(memory))
            done += count

    def _read_run(self, layer_idx: int, run: _Run, buffer: Tensor) -> None:
        file = self._files[layer_idx]
        memory = as_memoryview(buffer)[: run.num_slots * self._slot_bytes]
        offset, done = PAGE + run.first_slot * self._slot_bytes, 0
        while done < len(memory):
            try:
                count = os.preadv(file.number, [memory[done:]], offset + done)
            except OSError as error:
                raise ReadError(f"{file.path}: reading failed: {error.strerror}") from error
            if count <= 0:
                raise ReadError(
                    f"{file.path}: ends at byte {offset + done}",
                    hint="the file was cut while the model was open",
                )
            done += count
        self._bytes_read += len(memory)

    def _no_room(self, error: OSError, num_bytes: int) -> OllmError:
        assert self._directory is not None, "only an open store takes room"
        parent = self._directory.parent
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return KVStoreError(f"{parent}: writing KV failed: {error.strerror}")
        free = shutil.disk_usage(parent).free
        return DoesNotFitError(
            f"{parent}: KV needs {format_size(num_bytes)} more on disk, "
            f"{format_size(free)} is free",
            hint="give another kv_dir, or a shorter prompt",
        )

    def _make_file(self, layer_idx: int, fingerprint: str) -> _File:
        assert self._directory is not None, "files are made in the store's own directory"
        path = self._directory / f"layer-{layer_idx:05d}.kv"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        geometry = self._geometry
        header = {
            "version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "layer": layer_idx,
            "dtype": str(geometry.dtype).removeprefix("torch."),
            "block_size": geometry.block_size,
            "num_kv_heads": geometry.num_kv_heads,
            "head_dim": geometry.head_dim,
            "slot_bytes": self._slot_bytes,
        }
        page = aligned_buffer(PAGE)
        text = MAGIC + json.dumps(header).encode()
        as_memoryview(page)[: len(text)] = text
        try:
            number = _open_direct(path, flags)
            os.pwritev(number, [as_memoryview(page)], 0)
        except OSError as error:
            raise self._no_room(error, PAGE) from error
        return _File(path, number)

    def _remove(self) -> None:
        """Close the files and remove what this store made, and nothing else."""
        for file in self._files:
            os.close(file.number)
            with contextlib.suppress(OSError):
                file.path.unlink()
        self._files.clear()
        if self._directory is not None:
            with contextlib.suppress(OSError):
                self._directory.rmdir()
            self._directory = None


def _make_directory(parent: Path) -> Path:
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="ollm-kv-", dir=parent))
    except OSError as error:
        raise KVStoreError(
            f"{parent}: no KV directory can be made there: {error.strerror}",
            hint="give a directory that can be written to as kv_dir",
        ) from error


def _open_direct(path: Path, flags: int) -> int:
    """Open past the page cache, or through it where the file system refuses that."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems refuse after making the file
        return os.open(path, flags, 0o600)
