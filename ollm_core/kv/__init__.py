"""Keys, values and states of many sequences: on the device, in host memory or on disk."""

from ollm_core.kv.blocks import BlockKVStore
from ollm_core.kv.disk import DiskKVStore
from ollm_core.kv.hybrid import HybridKVStore
from ollm_core.kv.keeping import KeepingHybridKVStore
from ollm_core.kv.memory import DeviceKVStore, HostKVStore
from ollm_core.kv.prefixes import KeepingKVStore
from ollm_core.kv.state_files import StateFiles
from ollm_core.kv.states import StateStore
from ollm_core.kv.storage import BlockStorage, KVGeometry

__all__ = [
    "BlockKVStore",
    "BlockStorage",
    "DeviceKVStore",
    "DiskKVStore",
    "HostKVStore",
    "HybridKVStore",
    "KVGeometry",
    "KeepingHybridKVStore",
    "KeepingKVStore",
    "StateFiles",
    "StateStore",
]
