"""Finds which blocks several block tables have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ollm_core.contracts.kv import SharedRun


def shared_runs(
    tables: Sequence[Mapping[int, int]], num_full: Sequence[int], block_size: int
) -> list[SharedRun]:
    """What of the first `num_full` blocks of each table several of them have, as
    `KVStore.shared_runs` wants it. A table says which block is at which index.

    Two tables that have one block at one index have the same blocks before it: a block comes to a
    second table by a fork, which shares all up to it, and what is written anew has all after it cut
    off. So the place where they part is looked for in halves.
    """
    found = []
    waiting = [(tuple(range(len(tables))), 0)]  # rows that have the same blocks before an index
    while waiting:
        rows, begin = waiting.pop()
        by_block: dict[int, list[int]] = {}
        for row in rows:
            if begin < num_full[row]:
                by_block.setdefault(tables[row][begin], []).append(row)
        for alike in by_block.values():
            if len(alike) > 1:
                end = min(num_full[row] for row in alike)
                first = tables[alike[0]]
                for row in alike[1:]:
                    end = _parting(first, tables[row], begin + 1, end)
                found.append(SharedRun(tuple(alike), begin * block_size, end * block_size))
                waiting.append((tuple(alike), end))
    return found


def _parting(one: Mapping[int, int], other: Mapping[int, int], low: int, high: int) -> int:
    """The first index from `low` to `high` where two tables differ that are alike before `low`."""
    if low < high and one[high - 1] == other[high - 1]:
        return high  # as forks of one document mostly are
    while low < high:
        middle = (low + high) // 2
        if one[middle] == other[middle]:
            low = middle + 1
        else:
            high = middle
    return low
