"""KV stores that are made of blocks: sequences, and a block table for each of their layers.

This module knows sequences and the contract of a KV store. Which blocks a layer of a sequence has
is known to its BlockTable, where their bytes are to a BlockStorage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from ollm_core.contracts.kv import KVGeometry, KVStore, SharedRun, TierBytes
from ollm_core.device.memory import SHARED, DeviceMemory, OwnMemory
from ollm_core.errors import KVStoreError
from ollm_core.kv.block_storage import BlockStorage
from ollm_core.kv.block_table import BlockManager, BlockTable
from ollm_core.kv.block_upload import BlockUpload
from ollm_core.kv.block_views import Cut, CutBlocks
from ollm_core.kv.shared_runs import shared_runs
from ollm_core.memory.accounts import MemoryAccount


class BlockKVStore(KVStore):
    """A KV store of reference-counted blocks. Full blocks are shared by forks and never written
    again while they are. A sliding layer lets go of blocks as its window moves on.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        storage: BlockStorage,
        upload_account: MemoryAccount | None = None,
        memory: DeviceMemory = SHARED,
    ) -> None:
        """`memory` is the compute device's, unless blocks are there already: if it is its own, they
        are copied to it as they are read, through buffers that are held in `upload_account`.
        """
        self.geometry = geometry
        self.block_size = geometry.block_size
        self._storage = storage
        self._manager = BlockManager(geometry, storage)
        self._tables: dict[int, list[BlockTable]] = {}
        self._next_sequence = 0
        self._closed = False
        self._upload: BlockUpload | None = None
        if isinstance(memory, OwnMemory):
            try:
                self._upload = BlockUpload(geometry, memory.bus, upload_account)
            except BaseException:
                storage.close()
                raise

    def new_sequence(self) -> int:
        self._check_open()
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        self._tables[sequence] = [BlockTable() for _ in range(self.geometry.num_layers)]
        return sequence

    def growth_bytes(self, sequence: int, num_tokens: int, longest: int | None = None) -> TierBytes:
        tables = dict(enumerate(self._tables_of(sequence)))
        return self._storage.growth(*self._manager.missing(tables, num_tokens, longest))

    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        tables = dict(enumerate(self._tables_of(sequence)))
        self._storage.check()
        self._manager.grow(tables, num_tokens, longest)
        for table in tables.values():
            table.pinned = table.num_tokens

    def commit(self, sequence: int) -> None:
        for layer_idx, table in enumerate(self._tables_of(sequence)):
            table.pinned = 0
            self._manager.slide(layer_idx, table)

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """See KVStore. Raises KVStoreError for another shape or dtype; DoesNotFitError or ReadError
        also for a block that could not be written earlier.
        """
        table = self._table(layer_idx, sequence)
        num_new = self._check_new(layer_idx, keys, values)
        done = 0
        for tail in self._manager.room(layer_idx, table, num_new):
            count = tail.shape[2]
            for kept, given in zip(tail, (keys, values), strict=True):
                kept.copy_(given if count == num_new else given.narrow(1, done, count))
            done += count

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        table = self._table(layer_idx, sequence)
        wanted = table.num_tokens if num_tokens is None else num_tokens
        if not 0 <= first <= wanted <= table.num_tokens:
            raise KVStoreError(
                f"sequence {sequence} has {table.num_tokens} tokens in layer {layer_idx}; "
                f"cannot read {wanted} from {first} on",
                hint=f"num_tokens must be between 0 and {table.num_tokens}, first at most that",
            )
        indices = self._manager.indices(first, wanted)
        if not table.blocks.keys() >= set(indices):
            raise self._gone(layer_idx, sequence, f"read {wanted} from {first} on")
        self._storage.check()
        num_sealed = table.num_tokens // self.block_size
        sealed = [table.blocks[index] for index in indices if index < num_sealed]
        tail = () if table.tail is None or num_sealed not in indices else (table.tail,)
        blocks: Iterator[Tensor] = itertools.chain(self._storage.read(layer_idx, sealed), tail)
        cut = Cut(first, wanted, self.block_size, self._check_open)
        if self._upload is not None:
            return cut.pairs(self._upload.sent(layer_idx, blocks))
        runs = self._storage.read_runs(layer_idx, sealed)
        if runs is None:
            return cut.pairs(blocks)
        runs = itertools.chain(runs, (block[None] for block in tail))
        return CutBlocks(cut.pairs(blocks), cut.tiles(runs))

    def shared_runs(
        self, layer_idx: int, sequences: Sequence[int], ends: Sequence[int]
    ) -> Sequence[SharedRun]:
        """See KVStore. Full blocks alone are shared, and none of a layer with a window, where rows
        of different lengths need different ones.
        """
        if self.geometry.kinds[layer_idx].window is not None:
            return ()
        tables = [self._table(layer_idx, sequence) for sequence in sequences]
        num_full = [
            min(end, table.num_tokens) // self.block_size
            for end, table in zip(ends, tables, strict=True)
        ]
        return shared_runs([table.blocks for table in tables], num_full, self.block_size)

    @property
    def in_place(self) -> bool:
        return self._upload is None and self._storage.in_place

    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        if layer_idx is not None:
            return self._table(layer_idx, sequence).num_tokens
        return min(table.num_tokens for table in self._tables_of(sequence))

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """See KVStore. Also gives back what was reserved and not used.

        Raises DoesNotFitError or ReadError if the block that is cut cannot be copied; what is not
        cut then stays, and it may be tried again.
        """
        tables = self._tables_of(sequence)
        self._check_length(sequence, num_tokens, "truncate to")
        for layer_idx, table in enumerate(tables):
            self._manager.cut(layer_idx, table, num_tokens)

    def can_truncate(self, sequence: int, num_tokens: int) -> bool:
        try:
            self._check_length(sequence, num_tokens, "truncate to")
        except KVStoreError:
            return False
        return True

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        """See KVStore. Full blocks are shared, the tokens after them copied. Raises DoesNotFitError
        or ReadError with nothing changed.
        """
        sources = self._tables_of(sequence)
        wanted = self.num_tokens(sequence) if num_tokens is None else num_tokens
        self._check_length(sequence, wanted, "fork at")
        forked = self.new_sequence()
        try:
            for layer_idx, (source, table) in enumerate(
                zip(sources, self._tables[forked], strict=True)
            ):
                self._manager.share(layer_idx, source, table, wanted)
        except BaseException:
            self.release(forked)
            raise
        return forked

    def release(self, sequence: int) -> None:
        for layer_idx, table in enumerate(self._tables.pop(sequence, ())):
            self._manager.release(layer_idx, table)

    def tier_bytes(self) -> TierBytes:
        return self._storage.tier_bytes()

    @property
    def bytes_read(self) -> int:
        return self._storage.bytes_read

    def close(self) -> None:
        self._closed = True
        self._tables.clear()
        self._manager.forget()
        if self._upload is not None:
            self._upload.close()
            self._upload = None
        self._storage.close()

    def _blocks_of(self, sequence: int) -> list[tuple[int, list[int]]]:
        """Per layer: the index of the first block that it has of a sequence, and its blocks from
        there on, reserved ones left out.
        """
        found = []
        for table in self._tables_of(sequence):
            end = self._manager.num_blocks(table.num_tokens)
            indices = sorted(index for index in table.blocks if index < end)
            found.append((min(indices, default=0), [table.blocks[index] for index in indices]))
        return found

    def _adopt(
        self,
        sequences: Sequence[tuple[int, Sequence[tuple[int, Sequence[int]]]]],
        beside: Iterable[int] = (),
    ) -> list[int]:
        """New sequences, given as number of tokens and, per layer, what `_blocks_of` tells; all
        blocks are in the storage already. They may share some with each other and with the
        sequences `beside`, but with no others.
        """
        owned = {
            (layer_idx, block)
            for sequence in beside
            for layer_idx, (_, blocks) in enumerate(self._blocks_of(sequence))
            for block in blocks
        }
        found = []
        adopted = []
        for num_tokens, layers in sequences:
            found.append(self.new_sequence())
            for layer_idx, (first, blocks) in enumerate(layers):
                table = self._tables[found[-1]][layer_idx]
                table.blocks, table.num_tokens = dict(enumerate(blocks, first)), num_tokens
                adopted.append((layer_idx, table))
        self._manager.adopt(adopted, owned)
        return found

    def _leave(self, sequences: Iterable[int]) -> None:
        """Forget the only sequences that have blocks, which stay in the storage."""
        for sequence in sequences:
            del self._tables[sequence]
        self._manager.forget()

    def _check_open(self) -> None:
        if self._closed:
            raise KVStoreError("the KV store is closed")

    def _tables_of(self, sequence: int) -> list[BlockTable]:
        self._check_open()
        if sequence not in self._tables:
            raise KVStoreError(f"the KV store has no sequence {sequence}")
        return self._tables[sequence]

    def _table(self, layer_idx: int, sequence: int) -> BlockTable:
        tables = self._tables_of(sequence)
        if not 0 <= layer_idx < len(tables):
            raise KVStoreError(f"layer {layer_idx} is not one of the store's {len(tables)} layers")
        return tables[layer_idx]

    def _check_length(self, sequence: int, num_tokens: int, what: str) -> None:
        found = self.num_tokens(sequence)
        if not 0 <= num_tokens <= found:
            raise KVStoreError(
                f"sequence {sequence} has {found} tokens; cannot {what} {num_tokens}",
                hint=f"num_tokens must be between 0 and {found}",
            )
        for layer_idx, table in enumerate(self._tables_of(sequence)):
            first = self.geometry.first_needed(layer_idx, num_tokens)
            if not table.blocks.keys() >= set(self._manager.indices(first, num_tokens)):
                raise self._gone(layer_idx, sequence, f"{what} {num_tokens}")

    def _gone(self, layer_idx: int, sequence: int, what: str) -> KVStoreError:
        window, slack = self.geometry.kinds[layer_idx].window, self.geometry.slack
        return KVStoreError(
            f"layer {layer_idx} of sequence {sequence} has a sliding window, and only its last "
            f"{window} tokens; cannot {what}",
            hint=f"go back by at most {slack} tokens, or start a new sequence",
        )

    def _check_new(self, layer_idx: int, keys: Tensor, values: Tensor) -> int:
        """The number of tokens in `keys` and `values`, [G, T, D] each."""
        geometry = self.geometry
        num_new = keys.shape[1] if keys.ndim == 3 else 0
        kind = geometry.kinds[layer_idx]
        expected = kind.num_kv_heads, num_new, kind.head_dim
        for name, given in (("keys", keys), ("values", values)):
            if tuple(given.shape) != expected or given.dtype != geometry.dtype:
                raise KVStoreError(
                    f"{name} are {given.dtype} {list(given.shape)}, "
                    f"expected {geometry.dtype} {list(expected)}"
                )
        return num_new
