"""The KV tiers of core: what each is made of in a run and in a plan, once. The names are in
contracts/kv.py, where they are known without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.kv import KVGeometry, KVStore
from ollm_core.device.memory import SHARED, DeviceMemory
from ollm_core.kv.block_storage import BlockStorage
from ollm_core.kv.disk.checkpoints import CheckpointingStore
from ollm_core.kv.disk.directory import default_parent
from ollm_core.kv.disk.free_space import check_room
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore, HostKVStore
from ollm_core.kv.simulated_storage import SimulatedDiskStorage, SimulatedMemoryStorage
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.pair import PerMemory
from ollm_core.plugins.factories import KVRequest
from ollm_core.plugins.registry import require
from ollm_core.plugins.validation import CAPABILITIES

_NOBODY = "not kept"
"""The fingerprint of KV that no other run will look for."""


class OpensStore(Protocol):
    """How the store of a tier is opened. `memory` is the compute device's. Raises DoesNotFitError,
    KVStoreError.
    """

    def __call__(self, request: KVRequest, *, memory: DeviceMemory) -> KVStore:
        """A store for keys and values alone."""


Simulate = Callable[[KVGeometry, Accounts, DeviceMemory], tuple[BlockStorage, DeviceMemory]]
"""What holds the blocks in a plan, of a geometry on the meta device, and the memory to which they
are copied as they are read. Raises DoesNotFitError.
"""


@dataclass(frozen=True, slots=True)
class KVTier:
    """One place for keys and values. All that core knows of it by name is here."""

    open: OpensStore
    simulate: Simulate
    has_room: Callable[[int, PerMemory[int]], bool] = lambda num_bytes, limits: True
    """Whether "auto" may put so many bytes there, with these limits of device and host."""
    check: Callable[[KVRequest, int], None] = lambda request, at_least: None
    """Raises DoesNotFitError where there is no room for `at_least` tokens before any memory is
    taken.
    """
    in_files: bool = False
    """Whether keys and values go to the user's directory, and are read from there."""


def check_tier(adapter: ModelAdapter, tier: str) -> None:
    """Raises UnsupportedError for a tier that the family cannot use. It may declare so of those for
    which there is a capability.
    """
    if (capability := f"kv-{tier}") in CAPABILITIES:
        require(adapter, capability)


def _open_on_device(request: KVRequest, *, memory: DeviceMemory) -> KVStore:
    return DeviceKVStore(request.geometry, request.device_account)


def _open_on_host(request: KVRequest, *, memory: DeviceMemory) -> KVStore:
    return HostKVStore(
        request.geometry, request.host_account, request.device_account, memory=memory
    )


def _open_on_disk(request: KVRequest, *, memory: DeviceMemory) -> KVStore:
    geometry, device, host = request.geometry, request.device_account, request.host_account
    if request.directory and request.keep:
        return CheckpointingStore(
            geometry,
            host,
            request.directory,
            request.fingerprint(),
            device,
            memory=memory,
            budget=request.kept_bytes,
        )
    return DiskKVStore(geometry, host, _parent(request), _NOBODY, device, memory=memory)


def _check_disk(request: KVRequest, at_least: int) -> None:
    check_room(request.geometry, _parent(request), at_least)


def _parent(request: KVRequest) -> Path:
    return request.directory or default_parent()


def _simulate_on_device(
    geometry: KVGeometry, accounts: Accounts, memory: DeviceMemory
) -> tuple[BlockStorage, DeviceMemory]:
    device = geometry.device
    return SimulatedMemoryStorage(geometry, accounts.device, "device", device), SHARED


def _simulate_on_host(
    geometry: KVGeometry, accounts: Accounts, memory: DeviceMemory
) -> tuple[BlockStorage, DeviceMemory]:
    host = geometry.device
    return SimulatedMemoryStorage(geometry, accounts.host, "host", host, memory), memory


def _simulate_on_disk(
    geometry: KVGeometry, accounts: Accounts, memory: DeviceMemory
) -> tuple[BlockStorage, DeviceMemory]:
    return SimulatedDiskStorage(geometry, accounts.host), memory


TIERS: Mapping[str, KVTier] = MappingProxyType(
    {
        "device": KVTier(
            _open_on_device,
            _simulate_on_device,
            has_room=lambda num_bytes, limits: num_bytes <= limits.device // 4,
        ),
        "host": KVTier(
            _open_on_host,
            _simulate_on_host,
            has_room=lambda num_bytes, limits: num_bytes <= limits.host // 2,
        ),
        "disk": KVTier(_open_on_disk, _simulate_on_disk, check=_check_disk, in_files=True),
    }
)
"""By name, those of `KV_TIERS` in their order."""
