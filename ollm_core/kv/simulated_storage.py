"""Storages of blocks for dry runs: the accounts of real ones, and no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ollm_core.contracts.kv import KVGeometry, TierBytes
from ollm_core.device.buffers import PAGE
from ollm_core.kv.block_storage import BlockStorage
from ollm_core.kv.buffer_pool import Charges
from ollm_core.kv.disk.sizes import DiskSizes
from ollm_core.kv.in_memory import MemoryStorage
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.kinds import MemoryKind

_META = torch.device("meta")


class SimulatedDiskStorage(BlockStorage):
    """The accounts of DiskStorage, without files."""

    def __init__(self, geometry: KVGeometry, account: MemoryAccount) -> None:
        self._geometry = geometry
        self._sizes = DiskSizes(geometry)
        self._charges = Charges(account)
        self._num_slots: Counter[int] = Counter()
        self._free: dict[int, list[int]] = {}
        self._charges.take(MemoryKind.KV_WRITE_BUFFERS, self._sizes.write_bytes)
        try:
            self._charges.take(MemoryKind.KV_STAGING, 2 * self._sizes.lane_bytes)
        except BaseException:
            self._charges.close()
            raise

    def growth(self, num_blocks: Mapping[int, int], tails: Collection[int]) -> TierBytes:
        free = self._free
        new = {i: max(number - len(free.get(i, ())), 0) for i, number in num_blocks.items()}
        return self._sizes.growth(new, tails)

    def allocate(
        self, num_blocks: Mapping[int, int], tails: Collection[int]
    ) -> dict[int, list[int]]:
        self._charges.take(MemoryKind.KV_TAILS, self.growth(num_blocks, tails).host)
        found = {}
        for layer_idx, number in num_blocks.items():
            free = self._free.setdefault(layer_idx, [])
            missing = max(number - len(free), 0)
            first = self._num_slots[layer_idx]
            self._num_slots[layer_idx] += missing
            free.extend(range(first, first + missing))
            found[layer_idx] = free[:number]
            del free[:number]
        return found

    def free(self, layer_idx: int, blocks: Sequence[int]) -> None:
        self._free.setdefault(layer_idx, []).extend(blocks)

    def clear(self, layer_idx: int, blocks: Sequence[int]) -> None:
        """Nothing to do: there is no data."""

    def open(self, layer_idx: int, block: int) -> Tensor:
        shape = self._geometry.block_shape(layer_idx)
        return torch.empty(shape, dtype=self._geometry.dtype, device=_META)

    def drop(self, layer_idx: int) -> None:
        self._charges.give(MemoryKind.KV_TAILS, self._sizes.slot_bytes[layer_idx])

    def seal(self, layer_idx: int, block: int, tail: Tensor) -> Tensor:
        return tail

    def load(self, layer_idx: int, block: int, tail: Tensor) -> None:
        """Nothing to do: there is no data."""

    def unseal(self, layer_idx: int, block: int, tail: Tensor) -> None:
        """Nothing to do: there is no data."""

    def read(self, layer_idx: int, blocks: Sequence[int]) -> Iterator[Tensor]:
        return (self.open(layer_idx, block) for block in blocks)

    def tier_bytes(self) -> TierBytes:
        sizes = self._sizes.slot_bytes
        on_disk = sum(PAGE + self._num_slots[i] * size for i, size in enumerate(sizes))
        return TierBytes(host=self._charges.num_bytes, disk=on_disk)

    def close(self) -> None:
        self._charges.close()


class SimulatedMemoryStorage(MemoryStorage):
    """The accounts of MemoryStorage. Its tensors have no data."""

    def _new_block(self, layer_idx: int) -> Tensor:
        return torch.empty(0, device=_META)

    def open(self, layer_idx: int, block: int) -> Tensor:
        shape = self._geometry.block_shape(layer_idx)
        return torch.empty(shape, dtype=self._geometry.dtype, device=_META)
