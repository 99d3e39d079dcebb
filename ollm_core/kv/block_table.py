"""Block tables: which blocks hold the tokens of one layer of one sequence, and who else owns them.

This module knows tables, blocks and owners. Where the bytes of a block are is known to a
BlockStorage, what sequences there are to a BlockKVStore.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.block_storage import BlockStorage


@dataclass(eq=False, slots=True)
class BlockTable:
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


class BlockManager:
    """Gives the blocks of a storage to tables, and takes back those that no table has any more.

    Blocks are reference-counted: full ones are shared by tables, and never written again while they
    are. A sliding layer lets go of blocks as its window moves on. What takes blocks raises
    DoesNotFitError, what copies some ReadError too.
    """

    def __init__(self, geometry: KVGeometry, storage: BlockStorage) -> None:
        self._geometry = geometry
        self._block_size = geometry.block_size
        self._storage = storage
        self._num_sharers: Counter[tuple[int, int]] = Counter()  # owners beyond the first

    def missing(
        self, tables: Mapping[int, BlockTable], num_tokens: int, longest: int | None
    ) -> tuple[dict[int, int], list[int]]:
        """New blocks by layer, and layers that want a tail, to bring `tables` to `num_tokens`."""
        blocks = {}
        for layer_idx, table in tables.items():
            needed = self.num_blocks(num_tokens) - table.end
            window = self._geometry.kinds[layer_idx].window
            if window is not None:
                num_new = num_tokens - table.num_tokens
                span = window + self._geometry.slack + min(longest or num_new, num_new)
                needed = min(needed, self.num_blocks(span) + 1)  # it starts inside a block
            blocks[layer_idx] = needed - len(table.spares)
        return (
            {layer_idx: count for layer_idx, count in blocks.items() if count > 0},
            [
                layer_idx
                for layer_idx, table in tables.items()
                if table.tail is None and num_tokens > table.num_tokens
            ],
        )

    def grow(
        self, tables: Mapping[int, BlockTable], num_tokens: int, longest: int | None = None
    ) -> None:
        """Reserve what `missing` tells, for `tables` by layer."""
        num_blocks, tails = self.missing(tables, num_tokens, longest)
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

    def room(self, layer_idx: int, table: BlockTable, num_new: int) -> Iterator[Tensor]:
        """Parts of tails [2, G, n, D] for `num_new` tokens, each to be filled before the next."""
        self._storage.check()
        self.slide(layer_idx, table)
        index, inside = divmod(table.num_tokens, self._block_size)
        begun = table.tail is not None and index in table.blocks
        if not begun or inside + num_new > self._block_size:
            self.grow({layer_idx: table}, table.num_tokens + num_new)
        while num_new:
            inside = table.num_tokens % self._block_size
            block = self._next_block(table)
            if table.tail is None:
                table.tail = self._storage.open(layer_idx, block)
            count = min(self._block_size - inside, num_new)
            yield table.tail.narrow(2, inside, count)
            if inside + count == self._block_size:
                table.tail = self._storage.seal(layer_idx, block, table.tail)
            table.num_tokens += count  # only now: sealing may raise
            num_new -= count

    def slide(self, layer_idx: int, table: BlockTable) -> None:
        """Let go of the blocks that neither the next token nor a truncation needs. They become
        spares while a reservation wants some.
        """
        if self._geometry.kinds[layer_idx].window is None:
            return
        begin, pinned = (
            (self._geometry.first_needed(layer_idx, length) - self._geometry.slack)
            // self._block_size
            for length in (table.num_tokens, table.pinned)
        )
        pinned_end = self.num_blocks(table.pinned)
        past = [i for i in table.blocks if i < begin and not pinned <= i < pinned_end]
        num_wanted = max(self.num_blocks(table.num_reserved) - table.end, 0)
        for index in past:
            block = table.blocks.pop(index)
            if len(table.spares) < num_wanted and not self._num_sharers[layer_idx, block]:
                self._storage.clear(layer_idx, [block])
                table.spares.append(block)
            else:
                self.disown(layer_idx, [block])
        surplus, table.spares[num_wanted:] = table.spares[num_wanted:], []
        self.disown(layer_idx, surplus)

    def cut(self, layer_idx: int, table: BlockTable, num_tokens: int) -> None:
        """Bring a table back to `num_tokens`; what was reserved and not used goes too."""
        num_full, inside = divmod(num_tokens, self._block_size)
        in_tail = table.num_tokens // self._block_size == num_full
        num_kept = num_full + (inside > 0)
        dropped = [table.blocks.pop(i) for i in range(num_kept, table.end) if i in table.blocks]
        dropped += table.spares
        table.spares = []
        table.num_reserved = table.pinned = 0
        if not (inside and in_tail):
            self._drop_tail(layer_idx, table)
        table.num_tokens = min(table.num_tokens, num_kept * self._block_size)
        self.disown(layer_idx, dropped)
        if inside and not in_tail:
            self._reopen(layer_idx, table)
        table.num_tokens = num_tokens

    def share(self, layer_idx: int, source: BlockTable, table: BlockTable, num_tokens: int) -> None:
        """Let an empty table have the first `num_tokens` of another: full blocks are shared, the
        tokens after them copied.
        """
        num_full, inside = divmod(num_tokens, self._block_size)
        table.blocks = {i: block for i, block in source.blocks.items() if i < num_full}
        self._num_sharers.update((layer_idx, block) for block in table.blocks.values())
        if inside:
            in_tail = source.num_tokens // self._block_size == num_full
            held = source.tail if in_tail else None
            block, table.tail = self._copy_block(layer_idx, source.blocks[num_full], held)
            table.blocks[num_full] = block
        table.num_tokens = num_tokens

    def copy_block(self, layer_idx: int, table: BlockTable, index: int) -> None:
        """Let a table have a full block of its own in place of one that it has at `index`."""
        block = table.blocks[index]
        own, tail = self._copy_block(layer_idx, block)
        try:
            self._storage.seal(layer_idx, own, tail)
        except BaseException:
            self._storage.free(layer_idx, [own])
            raise
        finally:
            self._storage.drop(layer_idx)
        table.blocks[index] = own
        self.disown(layer_idx, [block])

    def hold(self, layer_idx: int, source: BlockTable, table: BlockTable, first: int) -> int | None:
        """Let an empty table share the full blocks of another from index `first` on, or what of
        them comes without a gap before its end. Returns a new block, the last one of the table, for
        the tokens after them, if there are any: to be written by the caller. Raises DoesNotFitError
        with the table empty.
        """
        num_full, inside = divmod(source.num_tokens, self._block_size)
        begin = num_full
        while begin > first and begin - 1 in source.blocks:
            begin -= 1
        new = self._storage.allocate({layer_idx: 1}, [])[layer_idx][0] if inside else None
        table.blocks = {i: source.blocks[i] for i in range(begin, num_full)}
        self._num_sharers.update((layer_idx, block) for block in table.blocks.values())
        if new is not None:
            table.blocks[num_full] = new
        table.num_tokens = source.num_tokens
        return new

    def go_on(self, layer_idx: int, source: BlockTable, table: BlockTable) -> None:
        """Let a table, grown to the length of `source`, have what that has after its own tokens:
        full blocks, of which there is one, are shared, the tokens after them copied. Raises
        ReadError or DamagedKVError; the table may be cut to its old length in any case.
        """
        num_full, inside = divmod(source.num_tokens, self._block_size)
        begun = table.num_tokens // self._block_size if table.num_tokens % self._block_size else -1
        shared = {i: block for i, block in source.blocks.items() if i < num_full}
        if begun >= 0 and begun not in shared and table.tail is not None:
            table.tail = self._storage.seal(layer_idx, table.blocks[begun], table.tail)
        own = [table.blocks.pop(i) for i in shared if i in table.blocks]
        self._num_sharers.update((layer_idx, block) for block in shared.values())
        table.blocks |= shared
        table.num_tokens = num_full * self._block_size
        self.disown(layer_idx, own)
        if inside:
            block = self._next_block(table)
            if table.tail is None:
                table.tail = self._storage.open(layer_idx, block)
            self._storage.load(layer_idx, source.blocks[num_full], table.tail)
            table.num_tokens = source.num_tokens
        surplus, table.spares = table.spares, []
        self.disown(layer_idx, surplus)

    def release(self, layer_idx: int, table: BlockTable) -> None:
        """Take back everything that a table has."""
        self._drop_tail(layer_idx, table)
        self.disown(layer_idx, [*table.blocks.values(), *table.spares])

    def disown(self, layer_idx: int, blocks: Sequence[int]) -> None:
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

    def adopt(
        self, tables: Iterable[tuple[int, BlockTable]], owned: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Take over tables, by layer, of blocks that are in the storage already. They may share
        some, with each other and with those who have the blocks `owned`, by layer.
        """
        owned = set(owned)
        for layer_idx, table in tables:
            keys = {(layer_idx, block) for block in table.blocks.values()}
            self._num_sharers.update(keys & owned)
            owned |= keys

    def forget(self) -> None:
        """There are no tables any more: nobody owns a block."""
        self._num_sharers.clear()

    def num_blocks(self, num_tokens: int) -> int:
        """How many hold so many tokens, from the first one on."""
        return -(-num_tokens // self._block_size)

    def indices(self, first: int, num_tokens: int) -> range:
        """Of the blocks that hold positions `first` to `num_tokens`."""
        begin = first // self._block_size
        return range(begin, self.num_blocks(num_tokens) if num_tokens > first else begin)

    def _next_block(self, table: BlockTable) -> int:
        """The block of the next token, which `grow` has made sure of."""
        index = table.num_tokens // self._block_size
        if index not in table.blocks:
            table.blocks[index] = table.spares.pop(0)
        return table.blocks[index]

    def _reopen(self, layer_idx: int, table: BlockTable) -> None:
        """Bring the last block, which is sealed, back into a tail; into one of its own if it is
        shared.
        """
        index = table.end - 1
        block = table.blocks[index]
        if self._num_sharers[layer_idx, block]:
            table.blocks[index], table.tail = self._copy_block(layer_idx, block)
            self.disown(layer_idx, [block])
            return
        self._storage.allocate({}, [layer_idx])
        try:
            tail = self._storage.open(layer_idx, block)
            self._storage.unseal(layer_idx, block, tail)
        except BaseException:
            self._storage.drop(layer_idx)
            raise
        table.tail = tail

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

    def _drop_tail(self, layer_idx: int, table: BlockTable) -> None:
        if table.tail is not None:
            self._storage.drop(layer_idx)
            table.tail = None
