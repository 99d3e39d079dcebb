"""KV on disk: blocks are in files, only the unfinished one of each layer is in memory."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ollm_core.contracts.closing import close_outside
from ollm_core.contracts.kv import KVGeometry, TierBytes
from ollm_core.device.buffers import as_memoryview
from ollm_core.device.memory import SHARED, DeviceMemory, memory_of
from ollm_core.errors import DamagedKVError, DoesNotFitError, OllmError, ReadError
from ollm_core.kv.block_storage import BlockStorage
from ollm_core.kv.block_store import BlockKVStore
from ollm_core.kv.block_table import BlockTable
from ollm_core.kv.buffer_pool import Charges
from ollm_core.kv.disk.borrowed import BorrowedHome
from ollm_core.kv.disk.directory import KVDirectory, make_home
from ollm_core.kv.disk.journal import checksum
from ollm_core.kv.disk.layer_file import LayerFile, storage_error
from ollm_core.kv.disk.read_ahead import ReadAhead, Staging, consecutive
from ollm_core.kv.disk.sizes import NUM_WRITE_BUFFERS, STAGING_BYTES, DiskSizes
from ollm_core.kv.disk.write_behind import WriteBehind
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.sizes import format_size

_THREAD_NAME = "ollm-kv"
_OWN_BLOCKS = 1 << 32
"""Our own blocks have numbers below it, those of the n-th borrowed home from n times it on."""


class DiskStorage(BlockStorage):
    """A file per layer in a directory of its own. A block is a slot of its layer's file, written
    behind the pass (see WriteBehind) and read ahead of it (see ReadAhead).
    """

    def __init__(
        self,
        geometry: KVGeometry,
        account: MemoryAccount,
        home: KVDirectory,
        staging_bytes: int,
        memory: DeviceMemory = SHARED,
    ) -> None:
        """Owns `home`. What is read is for a device with `memory`. If `home` has a journal,
        blocks get a checksum when they are written, and are compared with it whenever they are
        read.
        """
        self._geometry = geometry
        self._memory = memory
        self._sizes = DiskSizes(geometry, staging_bytes)
        self._slot_bytes = self._sizes.slot_bytes
        self._charges = Charges(account)
        self._bytes_read = 0
        self._counting = threading.Lock()  # guards it: two threads read
        self.checksums: dict[tuple[int, int], int] = {}
        """Of the blocks that are on disk, if there is a journal."""
        self.damaged: set[tuple[int, int]] = set()
        """Blocks with a checksum that could not be read as they were written."""
        self._homes = [home]  # always one; the finalizer closes that of the time
        self._borrowed: dict[int, BorrowedHome] = {}
        self._num_borrowed = 0
        with ExitStack() as stack:
            stack.callback(_close_homes, self._homes, self._borrowed)
            stack.callback(self._charges.close)
            self._charges.take(MemoryKind.KV_WRITE_BUFFERS, self._sizes.write_bytes)
            sizes = NUM_WRITE_BUFFERS * sorted(set(self._slot_bytes))
            writer, reader = (
                ThreadPoolExecutor(1, thread_name_prefix=_THREAD_NAME) for _ in range(2)
            )
            stack.callback(writer.shutdown, cancel_futures=True)
            stack.callback(reader.shutdown, cancel_futures=True)
            self._writes = WriteBehind(map(memory.host_buffer, sizes), writer)
            self._reads = ReadAhead(geometry, self._sizes, self._charges, memory, reader)
            # Also runs when nobody closed the store, and at exit: the files are the user's text.
            self._close = weakref.finalize(self, close_outside, stack.pop_all().close)

    @property
    def home(self) -> KVDirectory:
        """The directory that the blocks are in."""
        return self._homes[0]

    @property
    def _files(self) -> Sequence[LayerFile]:
        return self._homes[0].files

    def borrow(self, home: BorrowedHome) -> int:
        """Read the blocks of another home, too, which this then owns. Slot i of its files is block
        i beyond the number returned.
        """
        self._num_borrowed += 1
        self._borrowed[self._num_borrowed] = home
        return self._num_borrowed * _OWN_BLOCKS

    def give_home_back(self, first: int) -> None:
        """Close the borrowed home whose blocks begin at `first`. Nothing may hold them any more."""
        self._borrowed.pop(first // _OWN_BLOCKS).close()
        for key in [key for key in self.checksums if self.home_of(key[1]) == first]:
            del self.checksums[key]
        self.damaged -= {key for key in self.damaged if self.home_of(key[1]) == first}

    @staticmethod
    def home_of(block: int) -> int:
        """Where the blocks of its home begin: 0 if it is our own."""
        return block - block % _OWN_BLOCKS

    def move(self, home: KVDirectory) -> None:
        """Go on in another directory, which it then owns. What is in this one stays and is
        forgotten.
        """
        self.checksums.clear()
        self.damaged.clear()
        self._homes[0], old = home, self._homes[0]
        old.close()

    def growth(self, num_blocks: Mapping[int, int], tails: Collection[int]) -> TierBytes:
        new = {
            layer_idx: max(number - self._files[layer_idx].num_free, 0)
            for layer_idx, number in num_blocks.items()
        }
        return self._sizes.growth(new, tails)

    def allocate(
        self, num_blocks: Mapping[int, int], tails: Collection[int]
    ) -> dict[int, list[int]]:
        needed = self.growth(num_blocks, tails)
        self._charges.take(MemoryKind.KV_TAILS, needed.host)
        try:
            for layer_idx, number in num_blocks.items():
                file = self._files[layer_idx]
                file.grow(number - file.num_free)
        except BaseException as error:
            for layer_idx in num_blocks:
                self._files[layer_idx].give_back(())
            self._charges.give(MemoryKind.KV_TAILS, needed.host)
            if not isinstance(error, OSError):
                raise
            raise self._no_space(error, needed.disk) from error
        return {
            layer_idx: self._files[layer_idx].take(number)
            for layer_idx, number in num_blocks.items()
        }

    def free(self, layer_idx: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._forget(layer_idx, block)
        self._files[layer_idx].give_back([one for one in blocks if not self.home_of(one)])

    def clear(self, layer_idx: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._forget(layer_idx, block)

    def open(self, layer_idx: int, block: int) -> Tensor:
        buffer = self._memory.host_buffer(self._slot_bytes[layer_idx])
        return self._geometry.as_block(layer_idx, buffer)

    def drop(self, layer_idx: int) -> None:
        self._charges.give(MemoryKind.KV_TAILS, self._slot_bytes[layer_idx])

    def seal(self, layer_idx: int, block: int, tail: Tensor) -> Tensor:
        """See BlockStorage. Waits while all write buffers are in use. Raises as `check`."""
        spare = self._writes.put(
            (layer_idx, block),
            tail,
            self._buffer_of(layer_idx, tail),
            partial(self._write_slot, layer_idx, block, tail),
        )
        return self._geometry.as_block(layer_idx, spare)

    def load(self, layer_idx: int, block: int, tail: Tensor) -> None:
        if not self._writes.copy((layer_idx, block), tail):
            buffer = as_memoryview(self._buffer_of(layer_idx, tail))
            self._read_slots(layer_idx, [block], buffer)

    def unseal(self, layer_idx: int, block: int, tail: Tensor) -> None:
        self.load(layer_idx, block, tail)
        self._forget(layer_idx, block)

    def read(self, layer_idx: int, blocks: Sequence[int]) -> Iterator[Tensor]:
        for run in self.read_runs(layer_idx, blocks):
            yield from run.unbind()

    def read_runs(self, layer_idx: int, blocks: Sequence[int]) -> Iterator[Tensor]:
        return self._reads.runs(layer_idx, blocks, self._fill)

    def flush(self) -> None:
        """Return when the disk has every sealed block, or has refused one: raises as `check`."""
        self._writes.flush()

    def slot_bytes(self, layer_idx: int) -> int:
        """What a block of a layer takes on disk."""
        return self._slot_bytes[layer_idx]

    def sync(self, layer_idx: int) -> None:
        """Return when the disk has what was written of a layer. Raises OSError."""
        self._files[layer_idx].sync()

    @contextmanager
    def staging(self) -> Iterator[Tensor]:
        """A uint8 host buffer that is paid for, in the `with` block. Raises DoesNotFitError where
        it is in use.
        """
        with self._reads.buffer() as buffer:
            yield buffer

    def write_part(self, layer_idx: int, block: int, tail: Tensor, num_tokens: int) -> None:
        """Write the first `num_tokens` of a tail, and zeros after them, as `block`. The tail is not
        sealed by it. Raises DoesNotFitError or ReadError.
        """
        tail[:, :, num_tokens:] = 0
        self._write_slot(layer_idx, block, tail)

    def check(self) -> None:
        self._writes.check()

    def tier_bytes(self) -> TierBytes:
        on_disk = sum(file.num_bytes for file in self._files) if self._close.alive else 0
        return TierBytes(host=self._charges.num_bytes, disk=on_disk)

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def close(self) -> None:
        self._close()
        self._writes.clear()
        self._reads.clear()

    def _no_space(self, error: OSError, num_bytes: int) -> OllmError:
        found = storage_error(error, self.home.directory, "reserving space")
        if not isinstance(found, DoesNotFitError):
            return found
        parent = self.home.directory.parent
        disk = os.statvfs(parent)
        free = disk.f_bavail * disk.f_frsize
        needs = f"KV cache: need {format_size(num_bytes)} more in {parent}"
        if error.errno != errno.ENOSPC:  # a quota, or a limit of this process
            return DoesNotFitError(
                f"{needs}, which is not allowed: {error.strerror}",
                hint="raise the quota or the limit of file sizes, or name another directory with "
                "--kv-dir (kv_dir)",
            )
        return DoesNotFitError(
            f"{needs}, have {format_size(free)} free",
            hint=f"free {num_bytes} bytes, or name another directory with --kv-dir (kv_dir)",
        )

    def _write_slot(self, layer_idx: int, block: int, tail: Tensor) -> None:
        slot = as_memoryview(self._buffer_of(layer_idx, tail))
        if self.home.journal:  # first: a block that is read too early is then one that was damaged
            block_bytes = self._geometry.block_bytes(layer_idx)
            self.checksums[layer_idx, block] = checksum(slot[:block_bytes])
        self._files[layer_idx].write(block, slot)

    def _forget(self, layer_idx: int, block: int) -> None:
        """Return when nothing will write or remember `block` any more."""
        key = layer_idx, block
        self._writes.forget(key)
        self.checksums.pop(key, None)
        self.damaged.discard(key)

    def _fill(self, layer_idx: int, run: Sequence[int], staging: Staging) -> None:
        """Bring consecutive slots into `staging`, in one read unless some are not on disk yet."""
        on_disk = [
            place
            for place, block in enumerate(run)
            if not self._writes.copy((layer_idx, block), staging.blocks[place])
        ]
        for places in consecutive(on_disk):
            slot_bytes = self._slot_bytes[layer_idx]
            begin, end = places[0] * slot_bytes, (places[-1] + 1) * slot_bytes
            slots = run[places[0] : places[-1] + 1]
            self._read_slots(layer_idx, slots, staging.buffer[begin:end])

    def _read_slots(self, layer_idx: int, slots: Sequence[int], buffer: memoryview) -> None:
        """Read consecutive slots. Raises ReadError, of those with a checksum DamagedKVError."""
        known = {slot: self.checksums.get((layer_idx, slot)) for slot in slots}
        file = self._file_of(layer_idx, slots[0])
        try:
            file.read(slots[0] % _OWN_BLOCKS, buffer)
        except ReadError as error:
            damaged = {(layer_idx, slot) for slot in slots if known[slot] is not None}
            self.damaged.update(damaged)
            if not damaged:
                raise
            raise DamagedKVError(error.message, hint=error.hint) from error
        with self._counting:
            self._bytes_read += len(buffer)
        for place, slot in enumerate(slots):
            begin = place * self._slot_bytes[layer_idx]
            block = buffer[begin : begin + self._geometry.block_bytes(layer_idx)]
            if known[slot] is not None and checksum(block) != known[slot]:
                self.damaged.add((layer_idx, slot))
                raise DamagedKVError(
                    f"{file.path}: block {slot % _OWN_BLOCKS} is not what was written",
                    hint="`ollm cache verify` shows which prefixes are damaged",
                )

    def _file_of(self, layer_idx: int, block: int) -> LayerFile:
        number = block // _OWN_BLOCKS
        return (self._borrowed[number].files if number else self._files)[layer_idx]

    def _buffer_of(self, layer_idx: int, tail: Tensor) -> Tensor:
        """The whole pages of a tail, which the block need not fill."""
        num_bytes = self._slot_bytes[layer_idx]
        return tail.view(-1).view(torch.uint8).as_strided((num_bytes,), (1,))


class DiskKVStore(BlockKVStore):
    """Keys and values in files, with the unfinished block of each layer in host memory."""

    def __init__(
        self,
        geometry: KVGeometry,
        account: MemoryAccount,
        directory: Path,
        fingerprint: str,
        device_account: MemoryAccount | None = None,
        *,
        staging_bytes: int = STAGING_BYTES,
        home: KVDirectory | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        """Files go to `home`, or by default to a new directory inside `directory`, and away with
        `close`.

        `account` is that of the host; `device_account` holds the block being uploaded.
        `fingerprint` names the model, `memory` is that of the geometry's device, by default
        as `memory_of` says. Raises KVStoreError if `directory` cannot be written,
        DoesNotFitError if the buffers do not fit.
        """
        home = home or make_home(directory, geometry, fingerprint, keeping=False)
        memory = memory or memory_of(geometry.device)
        storage = self._disk = DiskStorage(geometry, account, home, staging_bytes, memory)
        super().__init__(geometry, storage, device_account, memory)

    def copy_end(self, layer_idx: int, source: BlockTable, table: BlockTable, first: int) -> None:
        """Let an empty table share the blocks of another from index `first` on, and have a copy on
        disk of the tokens in its tail. Raises OllmError or OSError.
        """
        block = self._manager.hold(layer_idx, source, table, first)
        if block is not None and source.tail is not None:
            inside = source.num_tokens % self.block_size
            self._disk.write_part(layer_idx, block, source.tail, inside)

    def _write_tails(self, sequence: int) -> None:
        """Write what is in the tails of a sequence where it will stay."""
        for layer_idx, table in enumerate(self._tables[sequence]):
            if table.tail is not None:
                num_tokens = table.num_tokens % self.block_size
                block = table.blocks[table.num_tokens // self.block_size]
                self._disk.write_part(layer_idx, block, table.tail, num_tokens)


def _close_homes(homes: list[KVDirectory], borrowed: dict[int, BorrowedHome]) -> None:
    for one in borrowed.values():
        one.close()
    homes[0].close()
