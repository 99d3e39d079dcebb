"""KV stores: keys, values and recurrent states of many sequences, on the device, in host memory or
on disk.
"""

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    """Names that docs/plugins.md once had plugins import from here."""
    if name not in ("HostKVStore", "KVGeometry"):
        raise AttributeError(f"module 'ollm_core.kv' has no attribute {name!r}")
    import ollm_core

    warnings.warn(
        f"ollm_core.kv.{name} is now ollm_core.{name}, and goes in ollm-core 0.2",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(ollm_core, name)
