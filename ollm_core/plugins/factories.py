"""Requests: what the factory of a plugin gets, and what it must return. Free of torch.

Each request is a frozen dataclass, so that it can say more in a later version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ollm_core.contracts.model import Config
from ollm_core.contracts.tensors import EncodedTensor, StoredForm, TensorInfo

if TYPE_CHECKING:
    import click

    from ollm_core.contracts.drafting import Drafter
    from ollm_core.contracts.kv import KVGeometry, KVStore
    from ollm_core.contracts.weights import ByteSource
    from ollm_core.memory.accounts import MemoryAccount


@dataclass(frozen=True, slots=True)
class KVRequest:
    """What a KV store is made from. One is made for each cache of the model."""

    geometry: KVGeometry
    """Layers, KV heads, dtype, the device that computes, tokens per block."""
    device_account: MemoryAccount
    """Reserve there what the store holds on the device. On a CPU this is memory too."""
    host_account: MemoryAccount
    """Reserve there what the store holds in host memory."""
    directory: Path | None
    """The user's `kv_dir`; None if none was given."""
    fingerprint: Callable[[], str]
    """Names the model by all bytes of its weights and its config: 64 hex digits. The first call may
    read every file, so only what keeps KV, or looks for some, asks. Raises ReadError.
    """
    keep: bool = True
    """Whether what is in `directory` may stay for the next run; see KeepsPrefixes."""
    kept_bytes: int | None = None
    """The most that may stay there, of all models and runs together; None is no limit."""


@dataclass(frozen=True, slots=True)
class CodecRequest:
    """A checkpoint as a weight codec sees it: names, dtypes, shapes and places, but no data."""

    config: Config
    """Of the language model, with the `quantization_config` of config.json."""
    tensors: Mapping[str, TensorInfo]
    """Every stored tensor, by name."""
    metadata: Mapping[Path, Mapping[str, str]]
    """The `__metadata__` of each safetensors file."""


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a draft source is made from. One is made for each model that is opened."""

    config: Config
    directory: Path
    """Of the checkpoint."""
    vocab_size: int
    tokenizer: Any
    """transformers' own; None if the directory has none."""
    device: str
    """Where the model computes, for instance "cpu" or "cuda:0"."""
    device_account: MemoryAccount
    """Reserve there what the source holds on the device."""
    host_account: MemoryAccount
    """Reserve there what the source holds in host memory."""


KVStoreFactory = Callable[[KVRequest], "KVStore"]
ReadingEngineFactory = Callable[[Sequence[Path]], "ByteSource"]
WeightCodec = Callable[[CodecRequest], Mapping[str, EncodedTensor]]


@runtime_checkable
class QuantizedCodec(Protocol):
    """A weight codec of a form that config.json states and transformers reads: what a checkpoint
    holds is then known without its files, and the dtypes that it states are those of the stored
    tensors.
    """

    def __call__(self, request: CodecRequest) -> Mapping[str, EncodedTensor]:
        """As every weight codec."""
        ...

    def describe(
        self, config: Config, tensors: Mapping[str, StoredForm]
    ) -> Mapping[str, StoredForm]:
        """What a checkpoint of this `config` stores for the `tensors` of the model, by name; those
        that are stored as they are unchanged.
        """
        ...


DraftSourceFactory = Callable[[DraftRequest], "Drafter"]
CommandFactory = Callable[[], "click.Command"]
