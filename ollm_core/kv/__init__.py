"""KV stores: keys and values per layer and sequence, in blocks, on the device, the host or the
disk.
"""

from ollm_core.kv.blocks import BlockKVStore, KVGeometry
from ollm_core.kv.disk import DiskKVStore
from ollm_core.kv.memory import DeviceKVStore, HostKVStore

__all__ = ["BlockKVStore", "DeviceKVStore", "DiskKVStore", "HostKVStore", "KVGeometry"]
