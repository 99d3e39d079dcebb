"""Cuts stored blocks to the positions that are asked for, one block or several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ollm_core.contracts.kv import TiledBlocks

Pairs = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Cut:
    """Positions `first` to `end` of blocks of `block_size` tokens. The blocks that hold them, and
    no others, are what it is given.
    """

    first: int
    end: int
    block_size: int
    check: Callable[[], None]
    """Called before each step that goes on; raises if the store is closed."""

    def pairs(self, blocks: Iterable[Tensor]) -> Pairs:
        """Blocks [2, G, block_size, D] as pairs of [G, n, D]."""
        begin = self.first - self.first % self.block_size
        for block in blocks:
            start, end = self._inside(begin)
            keys, values = block.narrow(2, start, end - start).unbind()
            yield keys, values
            begin += self.block_size
            self.check()

    def tiles(self, runs: Iterable[Tensor]) -> Pairs:
        """Runs [B, 2, G, block_size, D] as pairs of [B, G, n, D]: a block that is cut alone."""
        begin = self.first - self.first % self.block_size
        for run in runs:
            done = 0
            while done < len(run):
                start, end = self._inside(begin)
                count = 1
                if end - start == self.block_size:
                    count = min((self.end - begin) // self.block_size, len(run) - done)
                keys, values = run[done : done + count, :, :, start:end].unbind(1)
                yield keys, values
                begin += count * self.block_size
                done += count
                self.check()

    def _inside(self, begin: int) -> tuple[int, int]:
        """What is wanted of the block that begins at position `begin`."""
        return max(self.first - begin, 0), min(self.end - begin, self.block_size)


class CutBlocks(TiledBlocks):
    """Two ways through the same blocks, of which one is taken."""

    def __init__(self, pairs: Pairs, tiles: Pairs) -> None:
        self._pairs = pairs
        self._tiles = tiles

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self._pairs)

    def tiles(self) -> Pairs:
        return self._tiles
