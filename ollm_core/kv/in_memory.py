"""KV stores in memory: on the compute device, or on the host."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from ollm_core.contracts.kv import KVGeometry, Tier, TierBytes
from ollm_core.device.memory import SHARED, DeviceMemory, memory_of
from ollm_core.errors import DoesNotFitError
from ollm_core.kv.block_storage import BlockStorage
from ollm_core.kv.block_store import BlockKVStore
from ollm_core.kv.buffer_pool import Charges
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.sizes import format_size


class MemoryStorage(BlockStorage):
    """A tensor per block. The tail of a block is the block, so sealing costs nothing."""

    in_place = True

    def __init__(
        self,
        geometry: KVGeometry,
        account: MemoryAccount,
        tier: Tier,
        device: torch.device,
        memory: DeviceMemory = SHARED,
    ) -> None:
        """Blocks are on `device`, counted as `tier`; those in host memory are for a device with
        `memory`.
        """
        self._geometry = geometry
        self._tier = tier
        self._device = device
        self._memory = memory
        self._charges = Charges(account)
        self._blocks: dict[int, Tensor] = {}
        self._numbers = count()

    def growth(self, num_blocks: Mapping[int, int], tails: Collection[int]) -> TierBytes:
        return TierBytes(**{self._tier: self._num_bytes(num_blocks)})

    def allocate(
        self, num_blocks: Mapping[int, int], tails: Collection[int]
    ) -> dict[int, list[int]]:
        num_bytes = self._num_bytes(num_blocks)
        self._charges.take(MemoryKind.KV_BLOCKS, num_bytes)
        try:
            made = {
                layer_idx: [self._new_block(layer_idx) for _ in range(number)]
                for layer_idx, number in num_blocks.items()
            }
        except BaseException as error:
            self._charges.give(MemoryKind.KV_BLOCKS, num_bytes)
            if not isinstance(error, RuntimeError):  # torch's out of memory; it has no other cause
                raise
            raise DoesNotFitError(
                f"{self._charges.account.name}: cannot allocate {format_size(num_bytes)} for KV",
                hint="set a lower limit, or put the KV cache on disk: --kv disk (kv='disk')",
            ) from error
        found = {}
        for layer_idx, tensors in made.items():
            found[layer_idx] = [next(self._numbers) for _ in tensors]
            self._blocks.update(zip(found[layer_idx], tensors, strict=True))
        return found

    def free(self, layer_idx: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._blocks[block]
        self._charges.give(MemoryKind.KV_BLOCKS, len(blocks) * self._block_bytes(layer_idx))

    def clear(self, layer_idx: int, blocks: Sequence[int]) -> None:
        """Nothing to do: a block may be written over."""

    def open(self, layer_idx: int, block: int) -> Tensor:
        return self._blocks[block]

    def drop(self, layer_idx: int) -> None:
        """Nothing to do: the block stays."""

    def seal(self, layer_idx: int, block: int, tail: Tensor) -> Tensor | None:
        return None

    def load(self, layer_idx: int, block: int, tail: Tensor) -> None:
        tail.copy_(self._blocks[block])

    def unseal(self, layer_idx: int, block: int, tail: Tensor) -> None:
        """Nothing to do: `tail` is the block."""

    def read(self, layer_idx: int, blocks: Sequence[int]) -> Iterator[Tensor]:
        for block in blocks:
            yield self._blocks[block]

    def tier_bytes(self) -> TierBytes:
        return TierBytes(**{self._tier: self._charges.num_bytes})

    def close(self) -> None:
        self._blocks.clear()
        self._charges.close()

    def _num_bytes(self, num_blocks: Mapping[int, int]) -> int:
        return sum(n * self._block_bytes(layer_idx) for layer_idx, n in num_blocks.items())

    def _block_bytes(self, layer_idx: int) -> int:
        num_bytes = self._geometry.block_bytes(layer_idx)
        return self._memory.host_bytes(num_bytes)

    def _new_block(self, layer_idx: int) -> Tensor:
        shape, dtype = self._geometry.block_shape(layer_idx), self._geometry.dtype
        if self._memory.is_own:
            return self._memory.host_tensor(shape, dtype)
        with torch.inference_mode(mode=False):  # it outlives the pass
            return torch.empty(shape, dtype=dtype, device=self._device)


class DeviceKVStore(BlockKVStore):
    """Keys and values on the compute device: `blocks` gives out what is stored, without a copy."""

    def __init__(self, geometry: KVGeometry, account: MemoryAccount) -> None:
        """`account` is that of the compute device."""
        super().__init__(geometry, MemoryStorage(geometry, account, "device", geometry.device))


class HostKVStore(BlockKVStore):
    """Keys and values in host memory. Without a copy where the host computes; else locked, and each
    block uploaded as it is read.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        account: MemoryAccount,
        device_account: MemoryAccount | None = None,
        *,
        memory: DeviceMemory | None = None,
    ) -> None:
        """`account` is that of the host; `device_account` holds the block being uploaded. `memory`
        is that of the geometry's device, by default as `memory_of` says.
        """
        memory = memory or memory_of(geometry.device)
        storage = MemoryStorage(geometry, account, "host", torch.device("cpu"), memory)
        super().__init__(geometry, storage, device_account, memory)
