"""The core of oLLM: streams a model's weights through a bounded memory, exactly. See README.md for
the file map.
"""

from ollm_core.errors import (
    CheckpointError,
    ConfigError,
    DamagedKVError,
    DeviceError,
    DoesNotFitError,
    InputError,
    KVStoreError,
    OllmError,
    PluginError,
    ReadError,
    UnknownModelError,
    UnsupportedError,
)
from ollm_core.hookspecs import hookimpl
from ollm_core.interfaces import (
    ADAPTER_API,
    Attention,
    ByteSource,
    KeepsPrefixes,
    KVStore,
    KVView,
    ModelAdapter,
    TierBytes,
    WeightStreamer,
)
from ollm_core.types import (
    CacheKind,
    Capability,
    CatalogEntry,
    Config,
    Layout,
    ParameterSource,
    Progress,
    Stats,
    TensorInfo,
    WeightPlan,
)

__version__ = "0.1.0"

__all__ = [
    "ADAPTER_API",
    "Attention",
    "ByteSource",
    "CacheKind",
    "Capability",
    "CatalogEntry",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DamagedKVError",
    "DeviceError",
    "DoesNotFitError",
    "InputError",
    "KVStore",
    "KVStoreError",
    "KVView",
    "KeepsPrefixes",
    "Layout",
    "ModelAdapter",
    "OllmError",
    "ParameterSource",
    "PluginError",
    "Progress",
    "ReadError",
    "Stats",
    "TensorInfo",
    "TierBytes",
    "UnknownModelError",
    "UnsupportedError",
    "WeightPlan",
    "WeightStreamer",
    "hookimpl",
]
