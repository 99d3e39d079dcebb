"""What plugins and adapters import: contracts, the data that they speak of, requests and errors.
docs/plugins.md has a list by subject. Importing it loads no torch.

Applications use `ollm`. Tests of adapters and parts find what else they need in
`ollm_core.testing`, all errors are in `ollm_core.errors`; other modules may change.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.drafting import Drafter, FollowsText
from ollm_core.contracts.kv import (
    CacheKind,
    KeepsPrefixes,
    KVGeometry,
    KVStore,
    SharedRun,
    StateShape,
    TierBytes,
    TiledBlocks,
)
from ollm_core.contracts.model import Capability, CatalogEntry, Config, Layout
from ollm_core.contracts.tensors import (
    EncodedTensor,
    ParameterSource,
    StoredForm,
    TensorInfo,
    WeightPlan,
)
from ollm_core.contracts.weights import ByteSource
from ollm_core.errors import (
    CheckpointError,
    ConfigError,
    DamagedKVError,
    DoesNotFitError,
    InputError,
    KVStoreError,
    OllmError,
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
from ollm_core.plugins.factories import CodecRequest, DraftRequest, KVRequest, QuantizedCodec
from ollm_core.plugins.hookspecs import hookimpl
from ollm_core.plugins.validation import CAPABILITIES

if TYPE_CHECKING:
    from ollm_core.kv.in_memory import HostKVStore
    from ollm_core.model.apart import run_apart
    from ollm_core.model.skeleton import empty_model

__version__ = "0.1.0"

__all__ = [
    "CAPABILITIES",
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
    "DoesNotFitError",
    "DraftRequest",
    "Drafter",
    "EncodedTensor",
    "FollowsText",
    "HostKVStore",
    "InputError",
    "KVGeometry",
    "KVRequest",
    "KVStore",
    "KVStoreError",
    "KeepsPrefixes",
    "Layout",
    "MemoryAccount",
    "ModelAdapter",
    "OllmError",
    "ParameterSource",
    "QuantizedCodec",
    "ReadError",
    "SharedRun",
    "StateShape",
    "StoredForm",
    "TensorInfo",
    "TierBytes",
    "TiledBlocks",
    "UnknownModelError",
    "UnsupportedError",
    "WeightPlan",
    "bad_config",
    "catalog_entry",
    "empty_model",
    "head_sizes",
    "hookimpl",
    "read_size",
    "run_apart",
]

_NEEDS_TORCH = {
    "HostKVStore": "ollm_core.kv.in_memory",
    "empty_model": "ollm_core.model.skeleton",
    "run_apart": "ollm_core.model.apart",
}
"""Where names are that load torch when they are first used."""
_MOVED = {
    "ADAPTER_API": ("ollm_core.contracts.adapter", "ollm_core.testing"),
    "Attention": ("ollm_core.contracts.attention", "ollm_core.testing"),
    "DeviceError": ("ollm_core.errors", "ollm_core.errors"),
    "KVView": ("ollm_core.contracts.attention", "ollm_core.testing"),
    "KeepsStates": ("ollm_core.contracts.kv", "ollm_core.testing"),
    "NotFiniteError": ("ollm_core.errors", "ollm_core.errors"),
    "PluginError": ("ollm_core.errors", "ollm_core.errors"),
    "Progress": ("ollm_core.contracts.progress", "ollm"),
    "Stats": ("ollm_core.contracts.progress", "ollm"),
    "WeightStreamer": ("ollm_core.contracts.weights", "ollm_core.testing"),
}
"""Names that were exported here until 0.1: where each is, and where it is exported now."""


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    if name not in _MOVED:
        raise AttributeError(f"module 'ollm_core' has no attribute {name!r}")
    home, exported = _MOVED[name]
    warnings.warn(
        f"ollm_core.{name} is now {exported}.{name}, and goes in ollm-core 0.2",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(home), name)
