"""Stores in memory, on the device and on the host, keep the contract."""

from __future__ import annotations

from kv_content import geometry_of

from ollm_conformance import KVStoreConformance
from ollm_core.kv.in_memory import DeviceKVStore, HostKVStore


class TestDeviceStore(KVStoreConformance):
    """Keys and values on the compute device."""

    @classmethod
    def open_store(cls, shape, account, directory):
        return DeviceKVStore(geometry_of(shape), account)


class TestHostStore(KVStoreConformance):
    """Keys and values in host memory."""

    num_examples = 10

    @classmethod
    def open_store(cls, shape, account, directory):
        return HostKVStore(geometry_of(shape), account)
