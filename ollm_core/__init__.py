"""The core of oLLM: streams a model's weights through a bounded memory, exactly. See README.md for
the file map.
"""

from ollm_core.contracts.adapter import ADAPTER_API, ModelAdapter
from ollm_core.contracts.attention import Attention, KVView
from ollm_core.contracts.drafting import Drafter, FollowsText
from ollm_core.contracts.kv import (
    CacheKind,
    KeepsPrefixes,
    KeepsStates,
    KVGeometry,
    KVStore,
    StateShape,
    TierBytes,
    TiledBlocks,
)
from ollm_core.contracts.model import Capability, CatalogEntry, Config, Layout
from ollm_core.contracts.progress import Progress, Stats
from ollm_core.contracts.tensors import (
    EncodedTensor,
    ParameterSource,
    StoredForm,
    TensorInfo,
    WeightPlan,
)
from ollm_core.contracts.weights import ByteSource, WeightStreamer
from ollm_core.errors import (
    CheckpointError,
    ConfigError,
    DamagedKVError,
    DeviceError,
    DoesNotFitError,
    InputError,
    KVStoreError,
    NotFiniteError,
    OllmError,
    PluginError,
    ReadError,
    UnknownModelError,
    UnsupportedError,
)
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.plugins.decoder import (
    DecoderAdapter,
    bad_config,
    catalog_entry,
    head_sizes,
    read_size,
)
from ollm_core.plugins.factories import CodecRequest, DraftRequest, KVRequest
from ollm_core.plugins.hookspecs import hookimpl
from ollm_core.plugins.validation import CAPABILITIES
from ollm_core.weights.formats.mxfp4 import mxfp4_source

__version__ = "0.1.0"

__all__ = [
    "ADAPTER_API",
    "CAPABILITIES",
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
    "FollowsText",
    "InputError",
    "KVGeometry",
    "KVRequest",
    "KVStore",
    "KVStoreError",
    "KVView",
    "KeepsPrefixes",
    "KeepsStates",
    "Layout",
    "MemoryAccount",
    "ModelAdapter",
    "NotFiniteError",
    "OllmError",
    "ParameterSource",
    "PluginError",
    "Progress",
    "ReadError",
    "StateShape",
    "Stats",
    "StoredForm",
    "TensorInfo",
    "TierBytes",
    "TiledBlocks",
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
