"""Open a model: the only place that wires the parts together."""

from __future__ import annotations

import collections.abc
import functools
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from ollm_core.admission import Accounts
from ollm_core.allocator import AllocatorCap, free_device_bytes
from ollm_core.attention import ATTENTIONS
from ollm_core.budgets import layer_limits, stated_budgets
from ollm_core.checkpoint import Checkpoint, open_checkpoint, read_config
from ollm_core.drafts import LookupDrafter
from ollm_core.engine import Engine
from ollm_core.errors import ConfigError, InputError, PluginError
from ollm_core.generation import StreamedModel
from ollm_core.host_memory import HostMemory
from ollm_core.hub import resolve
from ollm_core.interfaces import ByteSource, Drafter
from ollm_core.machine import pick_device
from ollm_core.memory import MemoryAccount
from ollm_core.parts import DTYPES, one_of, take_apart
from ollm_core.plugins import Offer, one_line
from ollm_core.pressure import Pressure
from ollm_core.profiling import Profile, no_span
from ollm_core.registry import Registry, require
from ollm_core.requests import DraftRequest, KVRequest
from ollm_core.stores import StoreOpener, fingerprinter
from ollm_core.types import Progress
from ollm_core.weights.sources import check_source, open_source
from ollm_core.weights.tiered import TieredWeights


def load(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    device_layers: int | None = None,
    host_layers: int | None = None,
    kv: str = "auto",
    kv_dir: str | Path | None = None,
    keep_kv: bool = True,
    models_dir: str | Path | None = None,
    chunk_size: int | None = None,
    attention: str = "auto",
    reader: str = "auto",
    draft: str = "none",
    num_draft_tokens: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    profile: Profile | None = None,
    registry: Registry | None = None,
) -> StreamedModel:
    """Open the model in a directory, or one that is known by id, for running inside a bounded
    memory.

    - `device`: "auto", "cpu", "cuda" or "cuda:N". `dtype`: "auto" (the checkpoint's), or a key of
      `DTYPES`.
    - `device_memory`, `host_memory`: the most bytes to hold there, as `8GB`, `512MiB` or an int.
      Default: what is free now less a reserve, as `ollm_core.budgets` says. More than the machine
      has in all is refused. On a CPU, weights and activations count as device memory, KV on the
      host as host memory.
    - `device_layers`, `host_layers`: the most layers to keep on the device, and in host memory
      beside a GPU. Default: as many as the budgets allow; never more than that.
    - `kv`: where keys and values are kept; "auto" takes the first of device, host and disk that has
      room.
    - `kv_dir`: the directory for KV on disk. Only files made by this model are ever removed from
      it. What it holds is kept there when a cache is closed, and a later prompt on the same model
      that begins alike continues from there. Nothing is kept in the default directory.
    - `keep_kv`: False neither keeps KV in `kv_dir` nor looks for any.
    - `attention`: "exact" (bit for bit transformers' eager attention; memory grows with the
      context), "blockwise" (it does not), or "auto": exact up to 8,192 tokens where it fits.
    - `chunk_size`: tokens of a prompt that go through a layer together. Default: the largest that
      fits.
    - `reader`: the reading engine, "direct", "mmap" or "auto".
    - `draft`: where tokens guessed ahead come from: "none", or "lookup", which looks for the last
      ones earlier in the text. It changes the speed, not the text; batches go without.
    - `num_draft_tokens`: how many tokens are drafted at a time. Default: as many as pay, up to 10,
      by what drafts have cost and brought so far; none while they do not. With sampling 10, so
      that a seed repeats a text.
    - `profile`: where the time goes is counted in it; see `ollm_core.profiling`.

    `kv`, `reader` and `draft` also take a name that a plugin offers; "auto" never takes one.

    Raises an OllmError: UnknownModelError, ConfigError, CheckpointError, DeviceError,
    DoesNotFitError, InputError, PluginError.
    """
    registry = registry or Registry.discover()
    registry.check_name("ollm_kv_stores", kv)
    engine = registry.check_name("ollm_reading_engines", reader)
    draft_source = registry.check_name("ollm_draft_sources", draft)
    one_of("attention", attention, ("auto", *ATTENTIONS))
    one_of("dtype", dtype, ("auto", *DTYPES))
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}, expected at least 1")
    _check_draft_length(num_draft_tokens, draft)
    target = pick_device(device)
    layers = layer_limits(target, device_layers, host_layers)
    accounts = _accounts(target, device_memory, host_memory)
    cap = AllocatorCap(accounts.device, target) if target.type == "cuda" else nullcontext
    directory = resolve(str(path_or_id), registry, models_dir)
    whole_config = read_config(directory)
    adapter = registry.adapter_for(whole_config)
    demand = functools.partial(require, adapter)
    if draft != "none":
        demand("drafts")
    if attention == "blockwise":
        demand("blockwise-attention")
    if chunk_size is not None:
        demand("chunked-prefill")
    checkpoint = open_checkpoint(directory)
    parts = take_apart(
        adapter,
        whole_config,
        checkpoint,
        registry.offers("ollm_weight_codecs"),
        dtype=dtype,
        device=target,
        where=directory,
    )
    config, skeleton = parts.config, parts.skeleton
    with ExitStack() as opened:  # what fails from here on leaves nothing open
        source = _open(checkpoint, reader, engine)
        weights = opened.enter_context(
            TieredWeights(
                parts.units,
                profile.reading(source) if profile else source,
                parts.dtype,
                target,
                (accounts.device, accounts.host),
                buffer_bytes=skeleton.buffer_bytes,
                span=profile.span if profile else no_span,
            )
        )
        weights.held.layer_limits = layers
        skeleton.bind_norm(weights.norm)
        free_device = functools.partial(free_device_bytes, target)
        admission = parts.admission(
            accounts,
            weights,
            parts.workspace(),
            attention=attention,
            chunk_size=chunk_size,
            pressure=Pressure(
                weights, HostMemory().free, free_device if target.type == "cuda" else None
            ),
        )
        kv_request = KVRequest(
            parts.geometry,
            accounts.device,
            accounts.host,
            Path(kv_dir) if kv_dir is not None else None,
            fingerprinter(checkpoint, config),
            keep_kv,
        )
        tokenizer = _tokenizer(directory)
        draft_request = DraftRequest(
            config,
            directory,
            skeleton.config.vocab_size,
            tokenizer,
            str(target),
            accounts.device,
            accounts.host,
        )
        model = StreamedModel(
            skeleton,
            weights,
            Engine(
                skeleton,
                weights,
                admission,
                on_progress,
                cap,
                profile.span if profile else no_span,
            ),
            accounts,
            StoreOpener(kv, kv_request, adapter, registry),
            parts.kinds,
            weight_bytes=checkpoint.total_bytes,
            generation_config=_generation_config(directory),
            tokenizer=tokenizer,
            drafter=_drafter(draft, draft_source, draft_request),
            num_draft_tokens=num_draft_tokens,
            demand=demand,
        )
        opened.pop_all()
    return model


def _check_draft_length(num_draft_tokens: int | None, draft: str) -> None:
    if num_draft_tokens is None:
        return
    if num_draft_tokens < 1:
        raise InputError(
            f"num_draft_tokens is {num_draft_tokens}, expected at least 1",
            hint="draft='none' drafts nothing",
        )
    if draft == "none":
        raise InputError("num_draft_tokens needs a draft source", hint="add draft='lookup'")


def _drafter(draft: str, source: Offer | None, request: DraftRequest) -> Drafter | None:
    if source is None:
        return LookupDrafter() if draft == "lookup" else None
    # A Drafter is anything that can be called, which is what the plugin's answer is held against.
    found: Drafter = source.make(collections.abc.Callable, request)  # type: ignore[arg-type]
    return found


def _accounts(
    device: torch.device, device_memory: str | int | None, host_memory: str | int | None
) -> Accounts:
    budgets = stated_budgets(device, device_memory, host_memory)
    return Accounts(
        MemoryAccount("device memory", budgets.device), MemoryAccount("host memory", budgets.host)
    )


def _open(checkpoint: Checkpoint, reader: str, engine: Offer | None) -> ByteSource:
    checkpoint.check_unchanged()
    paths = list(checkpoint.files)
    if engine is None:
        return open_source(paths, reader)
    source: ByteSource = engine.make(ByteSource, paths)
    try:
        check_source(source, checkpoint.tensors.values())
    except Exception as error:
        source.close()
        raise PluginError(
            f"{engine} failed its test read: {one_line(error)}", hint="use reader='auto'"
        ) from error
    return source


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
