"""Block tables: which blocks hold the tokens of each sequence in each layer, and who shares them.

This module knows tokens, blocks and owners. Where the bytes of a block are is known to a
BlockStorage.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ollm_core.contracts.kv import KVGeometry, KVStore, SharedRun, TierBytes
from ollm_core.device.memory import SHARED, DeviceMemory, OwnMemory
from ollm_core.errors import KVStoreError
from ollm_core.kv.block_storage import BlockStorage
from ollm_core.kv.block_upload import BlockUpload
from ollm_core.kv.block_views import Cut, CutBlocks
from ollm_core.kv.shared_runs import shared_runs
from ollm_core.memory.accounts import MemoryAccount


@dataclass(eq=False, slots=True)
class _Table:
    """One layer of one sequence. Token at position p is in `blocks[p // block_size]`, if it is
    kept.
    """

    blocks: dict[int, int] = field(default_factory=dict)
    """Ascending: sealed ones, then the one that `tail` fills."""
    spares: list[int] = field(default_factory=list)
    """Reserved, to become the next blocks."""
    num_tokens: int = 0
    num_reserved: int = 0
    """Tokens that `spares` are for, if more than there are."""
    pinned: int = 0
    """Truncating to this length stays possible."""
    tail: Tensor | None = None
    """Holds the tokens after the last full block, or is there for those to come."""

    @property
    def end(self) -> int:
        """Index of the block after the last."""
        return next(reversed(self.blocks), -1) + 1


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
        self._tables: dict[int, list[_Table]] = {}
        self._next_sequence = 0
        self._num_sharers: Counter[tuple[int, int]] = Counter()  # owners beyond the first
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
        self._tables[sequence] = [_Table() for _ in range(self.geometry.num_layers)]
        return sequence

    def growth_bytes(self, sequence: int, num_tokens: int, longest: int | None = None) -> TierBytes:
        tables = dict(enumerate(self._tables_of(sequence)))
        return self._storage.growth(*self._missing(tables, num_tokens, longest))

    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        tables = dict(enumerate(self._tables_of(sequence)))
        self._storage.check()
        self._grow(tables, num_tokens, longest)
        for table in tables.values():
            table.pinned = table.num_tokens

    def commit(self, sequence: int) -> None:
        for layer_idx, table in enumerate(self._tables_of(sequence)):
            table.pinned = 0
            self._slide(layer_idx, table)

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """See KVStore. Raises KVStoreError for another shape or dtype; DoesNotFitError or ReadError
        also for a block that could not be written earlier.
        """
        table = self._table(layer_idx, sequence)
        num_new = self._check_new(layer_idx, keys, values)
        done = 0
        for tail in self._room(layer_idx, table, num_new):
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
        indices = self._indices(first, wanted)
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
            self._cut(layer_idx, table, num_tokens)

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
                self._share(layer_idx, source, table, wanted)
        except BaseException:
            self.release(forked)
            raise
        return forked

    def release(self, sequence: int) -> None:
        for layer_idx, table in enumerate(self._tables.pop(sequence, ())):
            self._drop_tail(layer_idx, table)
            self._disown(layer_idx, [*table.blocks.values(), *table.spares])

    def tier_bytes(self) -> TierBytes:
        return self._storage.tier_bytes()

    @property
    def bytes_read(self) -> int:
        return self._storage.bytes_read

    def close(self) -> None:
        self._closed = True
        self._tables.clear()
        self._num_sharers.clear()
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
            end = self._num_blocks(table.num_tokens)
            indices = sorted(index for index in table.blocks if index < end)
            found.append((min(indices, default=0), [table.blocks[index] for index in indices]))
        return found

    def _adopt(
        self, sequences: Sequence[tuple[int, Sequence[tuple[int, Sequence[int]]]]]
    ) -> list[int]:
        """New sequences of an empty store, given as number of tokens and, per layer, what
        `_blocks_of` tells; all blocks are in the storage already. They may share some.
        """
        found = []
        owned: set[tuple[int, int]] = set()
        for num_tokens, layers in sequences:
            found.append(self.new_sequence())
            for layer_idx, (first, blocks) in enumerate(layers):
                table = self._tables[found[-1]][layer_idx]
                table.blocks, table.num_tokens = dict(enumerate(blocks, first)), num_tokens
                keys = {(layer_idx, block) for block in blocks}
                self._num_sharers.update(keys & owned)
                owned |= keys
        return found

    def _leave(self, sequences: Iterable[int]) -> None:
        """Forget the only sequences that have blocks, which stay in the storage."""
        for sequence in sequences:
            del self._tables[sequence]
        self._num_sharers.clear()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _indices(self, first: int, num_tokens: int) -> range:
        """Of the blocks that hold positions `first` to `num_tokens`."""
        begin = first // self.block_size
        return range(begin, self._num_blocks(num_tokens) if num_tokens > first else begin)

    def _missing(
        self, tables: Mapping[int, _Table], num_tokens: int, longest: int | None
    ) -> tuple[dict[int, int], list[int]]:
        """New blocks by layer, and layers that want a tail, to bring `tables` to `num_tokens`."""
        blocks = {}
        for layer_idx, table in tables.items():
            needed = self._num_blocks(num_tokens) - table.end
            window = self.geometry.kinds[layer_idx].window
            if window is not None:
                num_new = num_tokens - table.num_tokens
                span = window + self.geometry.slack + min(longest or num_new, num_new)
                needed = min(needed, self._num_blocks(span) + 1)  # it starts inside a block
            blocks[layer_idx] = needed - len(table.spares)
        return (
            {layer_idx: count for layer_idx, count in blocks.items() if count > 0},
            [
                layer_idx
                for layer_idx, table in tables.items()
                if table.tail is None and num_tokens > table.num_tokens
            ],
        )

    def _grow(
        self, tables: Mapping[int, _Table], num_tokens: int, longest: int | None = None
    ) -> None:
        num_blocks, tails = self._missing(tables, num_tokens, longest)
        if num_blocks or tails:
            for layer_idx, blocks in self._storage.allocate(num_blocks, tails).items():
                tables[layer_idx].spares += blocks
        for table in tables.values():
            table.num_reserved = max(table.num_reserved, num_tokens)
        try:
            for layer_idx in tails:
                table = tables[layer_idx]
                table.tail = self._storage.open(layer_idx, self._next_block(table))
        finally:
            for layer_idx in tails:
                if tables[layer_idx].tail is None:
                    self._storage.drop(layer_idx)

    def _next_block(self, table: _Table) -> int:
        """The block of the next token, which `_grow` has made sure of."""
        index = table.num_tokens // self.block_size
        if index not in table.blocks:
            table.blocks[index] = table.spares.pop(0)
        return table.blocks[index]

    def _slide(self, layer_idx: int, table: _Table) -> None:
        """Let go of the blocks that neither the next token nor a truncation needs. They become
        spares while a reservation wants some.
        """
        if self.geometry.kinds[layer_idx].window is None:
            return
        begin, pinned = (
            (self.geometry.first_needed(layer_idx, length) - self.geometry.slack) // self.block_size
            for length in (table.num_tokens, table.pinned)
        )
        pinned_end = self._num_blocks(table.pinned)
        past = [i for i in table.blocks if i < begin and not pinned <= i < pinned_end]
        num_wanted = max(self._num_blocks(table.num_reserved) - table.end, 0)
        for index in past:
            block = table.blocks.pop(index)
            if len(table.spares) < num_wanted and not self._num_sharers[layer_idx, block]:
                self._storage.clear(layer_idx, [block])
                table.spares.append(block)
            else:
                self._disown(layer_idx, [block])
        surplus, table.spares[num_wanted:] = table.spares[num_wanted:], []
        self._disown(layer_idx, surplus)

    def _cut(self, layer_idx: int, table: _Table, num_tokens: int) -> None:
        num_full, inside = divmod(num_tokens, self.block_size)
        in_tail = table.num_tokens // self.block_size == num_full
        num_kept = num_full + (inside > 0)
        dropped = [table.blocks.pop(i) for i in range(num_kept, table.end) if i in table.blocks]
        dropped += table.spares
        table.spares = []
        table.num_reserved = table.pinned = 0
        if not (inside and in_tail):
            self._drop_tail(layer_idx, table)
        table.num_tokens = min(table.num_tokens, num_kept * self.block_size)
        self._disown(layer_idx, dropped)
        if inside and not in_tail:
            self._reopen(layer_idx, table)
        table.num_tokens = num_tokens

    def _reopen(self, layer_idx: int, table: _Table) -> None:
        """Bring the last block, which is sealed, back into a tail; into one of its own if it is
        shared.
        """
        index = table.end - 1
        block = table.blocks[index]
        if self._num_sharers[layer_idx, block]:
            table.blocks[index], table.tail = self._copy_block(layer_idx, block)
            self._disown(layer_idx, [block])
            return
        self._storage.allocate({}, [layer_idx])
        try:
            tail = self._storage.open(layer_idx, block)
            self._storage.unseal(layer_idx, block, tail)
        except BaseException:
            self._storage.drop(layer_idx)
            raise
        table.tail = tail

    def _share(self, layer_idx: int, source: _Table, table: _Table, num_tokens: int) -> None:
        num_full, inside = divmod(num_tokens, self.block_size)
        table.blocks = {i: block for i, block in source.blocks.items() if i < num_full}
        self._num_sharers.update((layer_idx, block) for block in table.blocks.values())
        if inside:
            in_tail = source.num_tokens // self.block_size == num_full
            held = source.tail if in_tail else None
            block, table.tail = self._copy_block(layer_idx, source.blocks[num_full], held)
            table.blocks[num_full] = block
        table.num_tokens = num_tokens

    def _copy_block(
        self, layer_idx: int, block: int, held: Tensor | None = None
    ) -> tuple[int, Tensor]:
        """A new block and its tail, which holds what `held` does, or else the sealed `block`."""
        new = self._storage.allocate({layer_idx: 1}, [layer_idx])[layer_idx][0]
        try:
            tail = self._storage.open(layer_idx, new)
            if held is None:
                self._storage.load(layer_idx, block, tail)
            else:
                tail.copy_(held)
        except BaseException:
            self._storage.drop(layer_idx)
            self._storage.free(layer_idx, [new])
            raise
        return new, tail

    def _disown(self, layer_idx: int, blocks: Sequence[int]) -> None:
        """Drop one owner of each block, and free those that had no other."""
        unowned = []
        for block in blocks:
            key = layer_idx, block
            if self._num_sharers[key]:
                self._num_sharers[key] -= 1
            else:
                unowned.append(block)
                self._num_sharers.pop(key, None)
        self._storage.free(layer_idx, unowned)

    def _drop_tail(self, layer_idx: int, table: _Table) -> None:
        if table.tail is not None:
            self._storage.drop(layer_idx)
            table.tail = None

    def _room(self, layer_idx: int, table: _Table, num_new: int) -> Iterator[Tensor]:
        """Parts of tails [2, G, n, D] for `num_new` tokens, each to be filled before the next."""
        self._storage.check()
        self._slide(layer_idx, table)
        index, inside = divmod(table.num_tokens, self.block_size)
        begun = table.tail is not None and index in table.blocks
        if not begun or inside + num_new > self.block_size:
            self._grow({layer_idx: table}, table.num_tokens + num_new)
        while num_new:
            inside = table.num_tokens % self.block_size
            block = self._next_block(table)
            if table.tail is None:
                table.tail = self._storage.open(layer_idx, block)
            count = min(self.block_size - inside, num_new)
            yield table.tail.narrow(2, inside, count)
            if inside + count == self.block_size:
                table.tail = self._storage.seal(layer_idx, block, table.tail)
            table.num_tokens += count  # only now: sealing may raise
            num_new -= count

    def _check_open(self) -> None:
        if self._closed:
            raise KVStoreError("the KV store is closed")

    def _tables_of(self, sequence: int) -> list[_Table]:
        self._check_open()
        if sequence not in self._tables:
            raise KVStoreError(f"the KV store has no sequence {sequence}")
        return self._tables[sequence]

    def _table(self, layer_idx: int, sequence: int) -> _Table:
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
            if not table.blocks.keys() >= set(self._indices(first, num_tokens)):
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
