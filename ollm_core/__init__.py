"""The core of oLLM: streams a model's weights through a bounded memory, exactly. See README.md for
the file map.
"""

from ollm_core.declarations import (
    DecoderAdapter,
    bad_config,
    catalog_entry,
    head_sizes,
    read_size,
)
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
    Drafter,
    KeepsPrefixes,
    KVStore,
    KVView,
    ModelAdapter,
    TierBytes,
    WeightStreamer,
)
from ollm_core.requests import CodecRequest, DraftRequest, KVRequest
from ollm_core.types import (
    CacheKind,
    Capability,
    CatalogEntry,
    Config,
    EncodedTensor,
    Layout,
    ParameterSource,
    Progress,
    Stats,
    StoredForm,
    TensorInfo,
    WeightPlan,
)
from ollm_core.weights.mxfp4 import mxfp4_source

__version__ = "0.1.0"

__all__ = [
    "ADAPTER_API",
    "Attention",
    "ByteSource",
    "CacheKind",
    "Capability",
    "CatalogEntry",
    "CheckpointError",
    "CodecRequest",
    "Config",
    "ConfigError",
    "DamagedKVError",
    "DecoderAdapter",
    "DeviceError",
    "DoesNotFitError",
    "DraftRequest",
    "Drafter",
    "EncodedTensor",
    "InputError",
    "KVRequest",
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
    "StoredForm",
    "TensorInfo",
    "TierBytes",
    "UnknownModelError",
    "UnsupportedError",
    "WeightPlan",
    "WeightStreamer",
    "bad_config",
    "catalog_entry",
    "head_sizes",
    "hookimpl",
    "mxfp4_source",
    "read_size",
]
