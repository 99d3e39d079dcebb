"""Keys and values in memory: on the device that computes, or on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ollm_core.interfaces import TierBytes
from ollm_core.kv.blocks import BlockKVStore, BlockStorage, KVGeometry
from ollm_core.memory import MemoryAccount


class DeviceKVStore(BlockKVStore):
    """All blocks on the compute device. `account` is the device's."""

    def __init__(self, geometry: KVGeometry, account: MemoryAccount) -> None:
        super().__init__(geometry, _MemoryStorage(geometry, account, on_host=False))


class HostKVStore(BlockKVStore):
    """All blocks in host memory, brought to the device one at a time. `account` is the host's."""

    def __init__(self, geometry: KVGeometry, account: MemoryAccount) -> None:
        super().__init__(geometry, _MemoryStorage(geometry, account, on_host=True))


class _MemoryStorage(BlockStorage):
    """A sealed block is its tail, and its own handle."""

    def __init__(self, geometry: KVGeometry, account: MemoryAccount, *, on_host: bool) -> None:
        self._geometry = geometry
        self._account = account
        self._on_host = on_host
        self._num_blocks = 0

    def cost(self, num_blocks: int, num_tails: int) -> TierBytes:
        num_bytes = num_blocks * self._geometry.block_bytes
        return TierBytes(host=num_bytes) if self._on_host else TierBytes(device=num_bytes)

    def take(self, blocks_per_layer: Sequence[int], num_tails: int) -> None:
        num_blocks = sum(blocks_per_layer)
        self._account.reserve("kv", num_blocks * self._geometry.block_bytes)
        self._num_blocks += num_blocks

    def give(self, blocks_per_layer: Sequence[int], num_tails: int) -> None:
        num_blocks = sum(blocks_per_layer)
        self._account.release("kv", num_blocks * self._geometry.block_bytes)
        self._num_blocks -= num_blocks

    def open_tail(self) -> Tensor:
        geometry = self._geometry
        device = torch.device("cpu") if self._on_host else geometry.device
        return torch.empty(
            geometry.block_shape,
            dtype=geometry.dtype,
            device=device,
            pin_memory=self._on_host and geometry.device.type == "cuda",
        )

    def drop_tail(self, tail: Tensor) -> None:
        pass

    def seal(self, layer_idx: int, tail: Tensor) -> object:
        return tail

    def read(self, layer_idx: int, handles: Sequence[object]) -> Iterator[Tensor]:
        for handle in handles:
            yield cast("Tensor", handle).to(self._geometry.device, non_blocking=True)

    def free(self, layer_idx: int, handle: object) -> None:
        pass

    def tier_bytes(self) -> TierBytes:
        return self.cost(self._num_blocks, 0)

    def close(self) -> None:
        pass
