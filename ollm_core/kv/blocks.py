"""Block tables: which blocks hold the tokens of each sequence in each layer, and who shares them.

This module knows tokens, blocks and owners. Where the bytes of a block are is known to a
BlockStorage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ollm_core.errors import KVStoreError
from ollm_core.interfaces import KVStore, TierBytes
from ollm_core.kv.lanes import Charges, Lanes
from ollm_core.kv.storage import BlockStorage, KVGeometry
from ollm_core.memory import MemoryAccount


@dataclass(eq=False, slots=True)
class _Table:
    """One layer of one sequence. Token at position p is in `blocks[p // block_size]`."""

    blocks: list[int] = field(default_factory=list)
    """Sealed ones, then the one that `tail` fills, then those reserved."""
    num_tokens: int = 0
    tail: Tensor | None = None
    """Holds the tokens after the last full block, or is there for those to come."""


class BlockKVStore(KVStore):
    """A KV store of reference-counted blocks. Full blocks are shared by forks and never written
    again while they are.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        storage: BlockStorage,
        upload_account: MemoryAccount | None = None,
        *,
        upload: bool = False,
    ) -> None:
        """With `upload`, blocks are copied to the compute device as they are read.

        The buffers for it are then held in `upload_account`.
        """
        self.geometry = geometry
        self.block_size = geometry.block_size
        self._storage = storage
        self._tables: dict[int, list[_Table]] = {}
        self._next_sequence = 0
        self._num_sharers: Counter[tuple[int, int]] = Counter()  # owners beyond the first
        self._closed = False
        self._upload_charges = Charges(upload_account) if upload and upload_account else None
        self._uploads: Lanes[Tensor] | None = None
        if upload:
            try:
                self._uploads = Lanes(
                    self._device_block, geometry.block_bytes, "kv upload", self._upload_charges
                )
            except BaseException:
                storage.close()
                raise

    def new_sequence(self) -> int:
        self._check_open()
        sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
        self._tables[sequence] = [_Table() for _ in range(self.geometry.num_layers)]
        return sequence

    def growth_bytes(self, sequence: int, num_tokens: int) -> TierBytes:
        tables = dict(enumerate(self._tables_of(sequence)))
        return self._storage.growth(*self._missing(tables, num_tokens))

    def reserve(self, sequence: int, num_tokens: int) -> None:
        tables = dict(enumerate(self._tables_of(sequence)))
        self._storage.check()
        self._grow(tables, num_tokens)

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        """See KVStore. Raises KVStoreError for another shape or dtype; DoesNotFitError or ReadError
        also for a block that could not be written earlier.
        """
        table = self._table(layer_idx, sequence)
        num_new = self._check_new(keys, values)
        self._storage.check()
        self._grow({layer_idx: table}, table.num_tokens + num_new)
        done = 0
        while done < num_new:
            block_idx, inside = divmod(table.num_tokens, self.block_size)
            block = table.blocks[block_idx]
            if table.tail is None:
                table.tail = self._storage.open(block)
            count = min(self.block_size - inside, num_new - done)
            table.tail[0, :, inside : inside + count] = keys[:, done : done + count]
            table.tail[1, :, inside : inside + count] = values[:, done : done + count]
            if inside + count == self.block_size:
                table.tail = self._storage.seal(layer_idx, block, table.tail)
            table.num_tokens += count  # only now: sealing may raise
            done += count

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        table = self._table(layer_idx, sequence)
        wanted = table.num_tokens if num_tokens is None else num_tokens
        if not 0 <= wanted <= table.num_tokens:
            raise KVStoreError(
                f"sequence {sequence} has {table.num_tokens} tokens in layer {layer_idx}; "
                f"cannot read {wanted}",
                hint=f"num_tokens must be between 0 and {table.num_tokens}",
            )
        self._storage.check()
        num_sealed = min(-(-wanted // self.block_size), table.num_tokens // self.block_size)
        sealed = self._storage.read(layer_idx, table.blocks[:num_sealed])
        tail = table.tail if wanted > num_sealed * self.block_size else None
        return self._views(sealed, tail, wanted)

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
            self._drop_tail(table)
            self._disown(layer_idx, table.blocks)

    def tier_bytes(self) -> TierBytes:
        return self._storage.tier_bytes()

    @property
    def bytes_read(self) -> int:
        return self._storage.bytes_read

    def close(self) -> None:
        self._closed = True
        self._tables.clear()
        self._num_sharers.clear()
        self._uploads = None
        if self._upload_charges:
            self._upload_charges.close()
        self._storage.close()

    def _blocks_of(self, sequence: int) -> list[tuple[int, list[int]]]:
        """Per layer: the index of the first block that it has of a sequence, and its blocks from
        there on, reserved ones left out.
        """
        tables = self._tables_of(sequence)
        return [(0, table.blocks[: -(-table.num_tokens // self.block_size)]) for table in tables]

    def _adopt(self, sequences: Sequence[tuple[int, Sequence[Sequence[int]]]]) -> list[int]:
        """New sequences of an empty store, given as number of tokens and blocks per layer, all of
        them in the storage already. They may share blocks.
        """
        found = []
        owned: set[tuple[int, int]] = set()
        for num_tokens, layers in sequences:
            found.append(self.new_sequence())
            for layer_idx, blocks in enumerate(layers):
                table = self._tables[found[-1]][layer_idx]
                table.blocks, table.num_tokens = list(blocks), num_tokens
                keys = {(layer_idx, block) for block in blocks}
                self._num_sharers.update(keys & owned)
                owned |= keys
        return found

    def _leave(self, sequences: Iterable[int]) -> None:
        """Forget the only sequences that have blocks, which stay in the storage."""
        for sequence in sequences:
            del self._tables[sequence]
        self._num_sharers.clear()

    def _views(
        self, sealed: Iterator[Tensor], tail: Tensor | None, num_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        tails = () if tail is None else (tail,)
        for block in self._on_device(sealed, tails):
            count = min(num_tokens, self.block_size)
            yield block[0, :, :count], block[1, :, :count]
            num_tokens -= count
            self._check_open()

    def _on_device(self, *parts: Iterable[Tensor]) -> Iterator[Tensor]:
        if self._uploads is None:
            for part in parts:
                yield from part
            return
        with self._uploads.lane() as buffer:
            for part in parts:
                for block in part:
                    # Stream order keeps this from overtaking the kernels that read the last block.
                    yield buffer.copy_(block, non_blocking=True)

    def _device_block(self) -> Tensor:
        geometry = self.geometry
        return torch.empty(geometry.block_shape, dtype=geometry.dtype, device=geometry.device)

    def _missing(self, tables: Mapping[int, _Table], num_tokens: int) -> tuple[dict[int, int], int]:
        """New blocks by layer, and new tails, that bring `tables` to `num_tokens`."""
        total = -(-num_tokens // self.block_size)
        blocks = {layer_idx: total - len(table.blocks) for layer_idx, table in tables.items()}
        growing = [table for table in tables.values() if num_tokens > table.num_tokens]
        return (
            {layer_idx: count for layer_idx, count in blocks.items() if count > 0},
            sum(table.tail is None for table in growing),
        )

    def _grow(self, tables: Mapping[int, _Table], num_tokens: int) -> None:
        num_blocks, num_tails = self._missing(tables, num_tokens)
        if not num_blocks and not num_tails:
            return
        for layer_idx, blocks in self._storage.allocate(num_blocks, num_tails).items():
            tables[layer_idx].blocks += blocks
        for table in tables.values():
            if table.tail is None and num_tokens > table.num_tokens:
                table.tail = self._storage.open(table.blocks[table.num_tokens // self.block_size])

    def _cut(self, layer_idx: int, table: _Table, num_tokens: int) -> None:
        num_full, inside = divmod(num_tokens, self.block_size)
        in_tail = table.num_tokens // self.block_size == num_full
        num_kept = num_full + (inside > 0)
        dropped, table.blocks[num_kept:] = table.blocks[num_kept:], []
        if not (inside and in_tail):
            self._drop_tail(table)
        table.num_tokens = min(table.num_tokens, num_kept * self.block_size)
        self._disown(layer_idx, dropped)
        if inside and not in_tail:
            self._reopen(layer_idx, table)
        table.num_tokens = num_tokens

    def _reopen(self, layer_idx: int, table: _Table) -> None:
        """Bring the last block, which is sealed, back into a tail; into one of its own if it is
        shared.
        """
        block = table.blocks[-1]
        if self._num_sharers[layer_idx, block]:
            table.blocks[-1], table.tail = self._copy_block(layer_idx, block)
            self._disown(layer_idx, [block])
            return
        self._storage.allocate({}, 1)
        tail = self._storage.open(block)
        try:
            self._storage.unseal(layer_idx, block, tail)
        except BaseException:
            self._storage.drop(tail)
            raise
        table.tail = tail

    def _share(self, layer_idx: int, source: _Table, table: _Table, num_tokens: int) -> None:
        num_full, inside = divmod(num_tokens, self.block_size)
        table.blocks = source.blocks[:num_full]
        self._num_sharers.update((layer_idx, block) for block in table.blocks)
        if inside:
            in_tail = source.num_tokens // self.block_size == num_full
            held = source.tail if in_tail else None
            block, table.tail = self._copy_block(layer_idx, source.blocks[num_full], held)
            table.blocks.append(block)
        table.num_tokens = num_tokens

    def _copy_block(
        self, layer_idx: int, block: int, held: Tensor | None = None
    ) -> tuple[int, Tensor]:
        """A new block and its tail, which holds what `held` does, or else the sealed `block`."""
        new = self._storage.allocate({layer_idx: 1}, 1)[layer_idx][0]
        tail = self._storage.open(new)
        try:
            if held is None:
                self._storage.load(layer_idx, block, tail)
            else:
                tail.copy_(held)
        except BaseException:
            self._storage.drop(tail)
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

    def _drop_tail(self, table: _Table) -> None:
        if table.tail is not None:
            self._storage.drop(table.tail)
            table.tail = None

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

    def _check_new(self, keys: Tensor, values: Tensor) -> int:
        """The number of tokens in `keys` and `values`, [G, T, D] each."""
        geometry = self.geometry
        num_new = keys.shape[1] if keys.ndim == 3 else 0
        expected = geometry.num_kv_heads, num_new, geometry.head_dim
        for name, given in (("keys", keys), ("values", values)):
            if tuple(given.shape) != expected or given.dtype != geometry.dtype:
                raise KVStoreError(
                    f"{name} are {given.dtype} {list(given.shape)}, "
                    f"expected {geometry.dtype} {list(expected)}"
                )
        return num_new
