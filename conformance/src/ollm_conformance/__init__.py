"""Proves an oLLM adapter or part. A whole test file:

    from ollm_conformance import AdapterConformance
    from ollm_adapter_x import XAdapter

    class TestX(AdapterConformance):
        adapter = XAdapter

Names are imported when they are first used: the command line looks in here and must not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ollm_conformance.adapter import AdapterConformance
    from ollm_conformance.parts.attention import AttentionConformance
    from ollm_conformance.parts.byte_source import ByteSourceConformance
    from ollm_conformance.parts.codec import CodecConformance
    from ollm_conformance.parts.drafter import DrafterConformance
    from ollm_conformance.parts.kv_store import KVStoreConformance
    from ollm_conformance.parts.weight_streamer import WeightStreamerConformance

__version__ = "0.1.0"

_HOMES = {
    "AdapterConformance": "ollm_conformance.adapter",
    "AttentionConformance": "ollm_conformance.parts.attention",
    "ByteSourceConformance": "ollm_conformance.parts.byte_source",
    "CodecConformance": "ollm_conformance.parts.codec",
    "DrafterConformance": "ollm_conformance.parts.drafter",
    "KVStoreConformance": "ollm_conformance.parts.kv_store",
    "WeightStreamerConformance": "ollm_conformance.parts.weight_streamer",
}

__all__ = [
    "AdapterConformance",
    "AttentionConformance",
    "ByteSourceConformance",
    "CodecConformance",
    "DrafterConformance",
    "KVStoreConformance",
    "WeightStreamerConformance",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ollm_conformance' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
