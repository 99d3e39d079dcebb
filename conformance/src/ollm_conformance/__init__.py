"""Proves an oLLM adapter or part. A whole test file:

    from ollm_conformance import AdapterConformance
    from ollm_adapter_x import XAdapter

    class TestX(AdapterConformance):
        adapter = XAdapter
"""

from ollm_conformance.adapter import AdapterConformance
from ollm_conformance.parts.attention import AttentionConformance
from ollm_conformance.parts.byte_source import ByteSourceConformance
from ollm_conformance.parts.kv_store import KVStoreConformance
from ollm_conformance.parts.weight_streamer import WeightStreamerConformance

__version__ = "0.1.0"

__all__ = [
    "AdapterConformance",
    "AttentionConformance",
    "ByteSourceConformance",
    "KVStoreConformance",
    "WeightStreamerConformance",
]
