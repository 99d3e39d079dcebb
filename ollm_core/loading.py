"""Open a model: the only place that wires the parts together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from ollm_core.admission import Accounts, Admission, Policy
from ollm_core.attention import ATTENTIONS
from ollm_core.checkpoint import Checkpoint, open_checkpoint, read_config
from ollm_core.engine import Engine
from ollm_core.errors import ConfigError, InputError, UnsupportedError
from ollm_core.generation import StreamedModel
from ollm_core.hub import resolve
from ollm_core.interfaces import ByteSource, ModelAdapter
from ollm_core.kv import BlockKVStore, DeviceKVStore, DiskKVStore, HostKVStore, KVGeometry
from ollm_core.machine import free_memory, pick_device
from ollm_core.memory import MemoryAccount, parse_size
from ollm_core.registry import Registry
from ollm_core.skeleton import Skeleton
from ollm_core.types import CacheKind, Config, Progress
from ollm_core.weights.sources import open_source
from ollm_core.weights.tiered import TieredWeights
from ollm_core.weights.units import cut_units
from ollm_core.workspace import Workspace

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KV_TIERS = ("auto", "device", "host", "disk")


def load(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    kv: str = "auto",
    kv_dir: str | Path | None = None,
    models_dir: str | Path | None = None,
    chunk_size: int | None = None,
    attention: str = "auto",
    reader: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
    registry: Registry | None = None,
) -> StreamedModel:
    """Open the model in a directory, or one that is known by id, for running inside a bounded
    memory.

    - `device`: "auto", "cpu", "cuda" or "cuda:N". `dtype`: "auto" (the checkpoint's), or a key of
      `DTYPES`.
    - `device_memory`, `host_memory`: the most bytes to hold there, as `8GB`, `512MiB` or an int.
      Default: most of what is free now. On a CPU, weights and activations count as device memory,
      KV on the host as host memory.
    - `kv`: where keys and values are kept; "auto" takes the first of device, host and disk that has
      room.
    - `kv_dir`: the directory for KV on disk. Only files made by this model are ever removed from
      it.
    - `attention`: "exact" (bit for bit transformers' eager attention; memory grows with the
      context), "blockwise" (it does not), or "auto": exact up to 8,192 tokens where it fits.
    - `chunk_size`: tokens of a prompt that go through a layer together. Default: the largest that
      fits.
    - `reader`: the reading engine, "direct", "mmap" or "auto".

    Raises an OllmError: UnknownModelError, ConfigError, CheckpointError, DeviceError,
    DoesNotFitError, InputError.
    """
    _one_of("kv", kv, KV_TIERS)
    _one_of("attention", attention, ("auto", *ATTENTIONS))
    _one_of("dtype", dtype, ("auto", *DTYPES))
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}, expected at least 1")
    target = pick_device(device)
    accounts = _accounts(target, device_memory, host_memory)
    registry = registry or Registry.discover()
    directory = resolve(str(path_or_id), registry, models_dir)
    config = read_config(directory)
    adapter = registry.adapter_for(config)
    checkpoint = open_checkpoint(directory)
    compute_dtype = _compute_dtype(dtype, config, checkpoint)
    layout = adapter.layout(config)
    kinds = _cache_kinds(adapter, config, layout.num_layers)
    skeleton = Skeleton(config, layout, compute_dtype, target)
    units = cut_units(
        layout,
        adapter.weights(config, checkpoint.tensors),
        checkpoint.tensors,
        skeleton.shapes,
        # In float32, matrix libraries give other last bits for a part of the rows.
        slice_head=compute_dtype != torch.float32,
    )
    source = _open(checkpoint, reader)
    weights = TieredWeights(units, source, compute_dtype, target, (accounts.device, accounts.host))
    skeleton.bind_norm(weights.norm)
    geometry = KVGeometry(kinds, compute_dtype, target)
    admission = Admission(
        Policy(attention, chunk_size),
        accounts,
        weights,
        Workspace(skeleton, geometry),
        hidden_size=skeleton.config.hidden_size,
        vocab_size=skeleton.config.vocab_size,
    )
    default_dir = Path(kv_dir) if kv_dir is not None else None
    fingerprint = functools.cache(checkpoint.content_fingerprint)  # reads a little of every tensor

    def open_store(tier: str, store_dir: Path | None, num_tokens: int) -> tuple[str, BlockKVStore]:
        _one_of("kv", tier or kv, KV_TIERS)
        return _open_store(
            tier or kv, store_dir or default_dir, num_tokens, geometry, accounts, fingerprint
        )

    return StreamedModel(
        skeleton,
        weights,
        Engine(skeleton, weights, admission, on_progress),
        accounts,
        open_store,
        weight_bytes=checkpoint.total_bytes,
        generation_config=_generation_config(directory),
        tokenizer=_tokenizer(directory),
    )


def _one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{what} is {value!r}", hint=f"one of: {', '.join(allowed)}")


def _accounts(
    device: torch.device, device_memory: str | int | None, host_memory: str | int | None
) -> Accounts:
    free_device, free_host = free_memory(device)
    return Accounts(
        MemoryAccount(
            "device memory", free_device if device_memory is None else parse_size(device_memory)
        ),
        MemoryAccount("host memory", free_host if host_memory is None else parse_size(host_memory)),
    )


def _compute_dtype(dtype: str, config: Config, checkpoint: Checkpoint) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    declared = config.get("dtype") or config.get("torch_dtype")
    if declared in DTYPES:
        return DTYPES[declared]
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in stored:
            return stored[tensor.dtype]
    raise ConfigError(
        f"{checkpoint.directory}: no dtype in config.json and no float tensor in the checkpoint",
        hint="give dtype, for instance bfloat16",
    )


def _cache_kinds(adapter: ModelAdapter, config: Config, num_layers: int) -> tuple[CacheKind, ...]:
    kinds = tuple(adapter.caches(config))
    if len(kinds) != num_layers:
        raise ConfigError(
            f"adapter {adapter.name} gives {len(kinds)} caches, expected {num_layers}"
        )
    for layer_idx, kind in enumerate(kinds):
        if kind.kind == "recurrent":
            raise UnsupportedError(
                f"layer {layer_idx} keeps a recurrent state, which is not supported yet"
            )
        if kind.kind == "sliding" and (kind.window is None or kind.window < 2):
            raise ConfigError(
                f"layer {layer_idx} has a sliding window of {kind.window} tokens, "
                "expected at least 2"
            )
        if kind.kind == "full" and kind.window is not None:
            raise ConfigError(f"layer {layer_idx} keeps all tokens, and yet has a window")
    return kinds


def _open(checkpoint: Checkpoint, reader: str) -> ByteSource:
    checkpoint.check_unchanged()
    return open_source(list(checkpoint.files), reader)


def _open_store(
    tier: str,
    directory: Path | None,
    num_tokens: int,
    geometry: KVGeometry,
    accounts: Accounts,
    fingerprint: Callable[[], str],
) -> tuple[str, BlockKVStore]:
    if tier == "auto":
        tier = _choose_tier(geometry, num_tokens, accounts, on_disk=directory is not None)
    if tier == "device":
        return tier, DeviceKVStore(geometry, accounts.device)
    if tier == "host":
        return tier, HostKVStore(geometry, accounts.host, accounts.device)
    home = directory or Path.home() / ".cache" / "ollm" / "kv"
    return tier, DiskKVStore(geometry, accounts.host, home, fingerprint(), accounts.device)


def _choose_tier(
    geometry: KVGeometry, num_tokens: int, accounts: Accounts, *, on_disk: bool
) -> str:
    """The first tier of which the expected tokens take at most a quarter (device) or half
    (host).
    """
    if on_disk:
        return "disk"
    num_expected = num_tokens + geometry.block_size
    # Windows are not counted: how many rows share the tokens is not known here.
    layer_bytes = sum(map(geometry.block_bytes, range(geometry.num_layers)))
    expected = layer_bytes * num_expected // geometry.block_size
    if expected <= accounts.device.limit // 4:
        return "device"
    return "host" if expected <= accounts.host.limit // 2 else "disk"


def _generation_config(directory: Path) -> GenerationConfig | None:
    if not (directory / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{directory / 'generation_config.json'}: {error}") from error


def _tokenizer(directory: Path) -> Any:
    """The tokenizer of the directory, or None if it has none: token ids are enough to run a
    model.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"{directory}: the tokenizer cannot be opened: {' '.join(str(error).split())}"
        ) from error
