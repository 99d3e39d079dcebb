"""Builds a model inside its memory accounts: `open_model` is all of it, from top to bottom;
`open_drafter` builds a draft model in the same order.
"""

from __future__ import annotations

import collections.abc
import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ollm_core.attention.trial import require_flash
from ollm_core.calibration.rates import fastest_blocks, fastest_reader
from ollm_core.checkpoint.locate import resolve
from ollm_core.checkpoint.safetensors import Checkpoint, open_checkpoint, read_config
from ollm_core.contracts.drafting import Drafter
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.memory import DeviceMemory, memory_of
from ollm_core.device.openmp import openmp_threads_end
from ollm_core.device.select import pick_device
from ollm_core.drafting.draft_memory import DraftAccounts, DraftMemory
from ollm_core.drafting.draft_model import ModelDrafter, check_vocabulary
from ollm_core.drafting.lookup import LookupDrafter
from ollm_core.engine.activations import Workspace
from ollm_core.engine.engine import Engine
from ollm_core.engine.pass_planner import PassPlanner, Policy
from ollm_core.errors import InputError, PluginError, one_line
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.kv.factory import StoreOpener, find_directory
from ollm_core.memory.accounts import Accounts, open_accounts
from ollm_core.memory.budgets import layer_limits, stated_budgets
from ollm_core.memory.cuda_limit import AllocatorCap, free_device_bytes
from ollm_core.memory.host import HostMemory
from ollm_core.memory.pair import PerMemory
from ollm_core.memory.sizes import format_size, parse_size
from ollm_core.model.fingerprint import identity
from ollm_core.model.names import remember_name
from ollm_core.model.spec import ModelSpec, inspect_model
from ollm_core.options import LoadOptions
from ollm_core.plugins.factories import DraftRequest, KVRequest
from ollm_core.plugins.loader import Offer
from ollm_core.plugins.registry import Registry, require
from ollm_core.profiling import Span, no_span
from ollm_core.text.generation_config import read_generation_config
from ollm_core.text.tokenizer import open_tokenizer
from ollm_core.values import PathLike, dtype_name, whole_number
from ollm_core.weights.eviction import Eviction, reserve_bytes
from ollm_core.weights.sources.posix import check_source, open_source
from ollm_core.weights.streamer import TieredStreamer

logger = logging.getLogger("ollm")


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a model and its draft model have in common: plugins, the device, and how files are
    read.
    """

    registry: Registry
    device: torch.device
    dtype: str
    """To compute in, or "auto"."""
    precision: str
    reader: str
    memory: DeviceMemory
    """That of the device."""
    cap: Callable[[], AbstractContextManager[None]] = nullcontext
    """Held during each pass of either."""


@openmp_threads_end()
def open_model(path_or_id: PathLike, options: LoadOptions, registry: Registry) -> StreamedModel:
    """The model, with its draft source. Raises an OllmError with nothing left open."""
    # Where it runs, and in how much memory.
    device, profile = pick_device(options.device), options.profile
    layers = layer_limits(device, options.device_layers, options.host_layers)
    budgets = stated_budgets(device, options.device_memory, options.host_memory)
    accounts = open_accounts(budgets)
    cap = AllocatorCap(accounts.device, device) if device.type == "cuda" else nullcontext
    dtype, precision, reader = dtype_name(options.dtype), options.precision, options.reader
    runtime = Runtime(registry, device, dtype, precision, reader, memory_of(device), cap)
    kv_dir = find_directory(options.kv_dir)

    # What the model is, and whether it can do what is asked. Of its files only headers are read.
    spec = inspect_directory(runtime, resolve(path_or_id, registry, options.models_dir))
    if options.draft != "none":
        require(spec.adapter, "drafts")
    chunk_size = whole_number(options.chunk_size)
    policy = Policy.of(spec, options.attention, chunk_size, fastest_blocks(device, spec.dtype))
    if options.attention == "flash":
        require_flash(device, spec.dtype, here=True)

    with ExitStack() as opened:  # what fails from here on leaves nothing open
        # Weights: what reads them, and what streams them through memory.
        source = opened.enter_context(_open_source(runtime, spec.checkpoint))
        read, span = (profile.reading(source), profile.span) if profile else (source, no_span)
        weights = opened.enter_context(_open_weights(runtime, spec, read, accounts, span))
        weights.limit_layers(layers)

        # The engine: what admits its passes, and what runs them.
        workspace = Workspace.of(spec, registry.proven)
        pass_planner = PassPlanner(policy, accounts, weights, workspace, _eviction(weights))
        check_files = spec.checkpoint.check_unchanged
        engine = Engine(
            spec.skeleton, weights, pass_planner, options.on_progress, cap, span, check_files
        )

        # The model as transformers knows one: KV caches, a generation config, a tokenizer.
        kv_request = _kv_request(
            spec,
            accounts,
            engine,
            pass_planner,
            kv_dir,
            keep=options.keep_kv,
            kept_bytes=None if options.kv_budget is None else parse_size(options.kv_budget),
        )
        directory = spec.checkpoint.directory
        model = StreamedModel(
            spec.skeleton,
            weights,
            engine,
            accounts,
            StoreOpener(options.kv, kv_request, spec.adapter, registry, spec.memory),
            spec.kinds,
            weight_bytes=spec.checkpoint.total_bytes,
            generation_config=read_generation_config(directory, spec.skeleton.config.to_dict()),
            tokenizer=open_tokenizer(directory, trust_remote_code=options.trust_remote_code),
            demand=functools.partial(require, spec.adapter),
        )
        opened.enter_context(model)

        # What drafts for it.
        drafter: Drafter | None = None
        if options.draft_model is not None:
            draft = resolve(options.draft_model, registry, options.models_dir)
            drafter = open_drafter(runtime, model, draft)
        elif options.draft == "lookup":
            drafter = LookupDrafter()
        elif offer := registry.check_name("ollm_draft_sources", options.draft):
            drafter = _make_drafter(offer, spec, model)
        model.draft_with(drafter, whole_number(options.num_draft_tokens))
        opened.pop_all()
    return model


def open_drafter(runtime: Runtime, main: StreamedModel, directory: Path) -> ModelDrafter:
    """Open the model in `directory` as draft source of `main`, in a part of its accounts. Raises an
    OllmError with nothing left open.

    Python code of its tokenizer is never run: that `main`'s may be says nothing of this one.
    """
    spec = inspect_directory(runtime, directory)
    require(spec.adapter, "truncate")
    vocab_size, tokenizer = spec.skeleton.config.vocab_size, open_tokenizer(directory)
    check_vocabulary(vocab_size, tokenizer, main.config.vocab_size, main.tokenizer)
    drafter = build_drafter(runtime, spec, main.accounts, main.engine.set_aside)
    if spec.checkpoint.total_bytes > main.weight_bytes:
        logger.warning(
            "the draft model is larger than the model: %s, %s",
            format_size(spec.checkpoint.total_bytes),
            format_size(main.weight_bytes),
        )
    return drafter


def build_drafter(
    runtime: Runtime,
    spec: ModelSpec,
    whole: Accounts,
    set_aside: Callable[[str, PerMemory[int]], None],
) -> ModelDrafter:
    """A draft model in a part of the accounts `whole`, in which `set_aside` reserves. Raises
    DoesNotFitError where its weights have no room.
    """
    with ExitStack() as opened:  # what fails from here on leaves nothing open
        # Weights, and the part of the memory that holds all of them.
        source = opened.enter_context(_open_source(runtime, spec.checkpoint))
        workspace = Workspace.of(spec, runtime.registry.proven)
        room = DraftMemory(spec, source, workspace, fastest_blocks(runtime.device, spec.dtype))
        part = opened.enter_context(DraftAccounts(whole, set_aside))
        part.resize(room.needed(1))
        weights = opened.enter_context(_open_weights(runtime, spec, source, part.accounts))

        # The engine.
        pass_planner = room.pass_planner(part.accounts, weights, _eviction(weights))
        check_files = spec.checkpoint.check_unchanged
        engine = Engine(
            spec.skeleton, weights, pass_planner, cap=runtime.cap, check_files=check_files
        )

        # One KV store on the device.
        kv_request = _kv_request(spec, part.accounts, engine, pass_planner)
        open_store = StoreOpener("device", kv_request, spec.adapter, runtime.registry, spec.memory)
        _, store = open_store("device", None, num_tokens=0)
        opened.enter_context(store)
        drafter = ModelDrafter(engine, store, room, part)
        opened.pop_all()
    return drafter


def inspect_directory(runtime: Runtime, directory: Path) -> ModelSpec:
    """What the model in `directory` is. Raises ConfigError, CheckpointError, UnknownModelError."""
    config = read_config(directory)
    return inspect_model(
        runtime.registry.adapter_for(config),
        config,
        open_checkpoint(directory),
        runtime.registry.offers("ollm_weight_codecs"),
        dtype=runtime.dtype,
        device=runtime.device,
        where=directory,
        precision=runtime.precision,
        memory=runtime.memory,
    )


def _open_source(runtime: Runtime, checkpoint: Checkpoint) -> ByteSource:
    """What reads the weights. Raises ReadError, PluginError."""
    engine = runtime.registry.check_name("ollm_reading_engines", runtime.reader)
    if runtime.reader == "auto":
        try:
            return _source_by(checkpoint, fastest_reader(checkpoint.directory), None)
        except InputError:  # one that worked when it was measured; CheckpointError comes again
            pass
    return _source_by(checkpoint, runtime.reader, engine)


def _source_by(checkpoint: Checkpoint, reader: str, engine: Offer | None) -> ByteSource:
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


def _open_weights(
    runtime: Runtime,
    spec: ModelSpec,
    source: ByteSource,
    accounts: Accounts,
    span: Span = no_span,
) -> TieredStreamer:
    """The weights, which close `source`. Raises DoesNotFitError."""
    return TieredStreamer(
        spec.units,
        source,
        spec.dtype,
        runtime.device,
        accounts,
        buffer_bytes=spec.skeleton.buffer_bytes,
        span=span,
        memory=spec.memory,
    )


def _eviction(weights: TieredStreamer) -> Eviction:
    """Lets kept weights give way when others take the machine's memory."""
    device, host = weights.device, HostMemory()
    free = functools.partial(free_device_bytes, device) if device.type == "cuda" else None
    return Eviction(weights, host.free, free, reserve_bytes=reserve_bytes(host.total()))


def _kv_request(
    spec: ModelSpec,
    accounts: Accounts,
    engine: Engine,
    pass_planner: PassPlanner,
    directory: Path | None = None,
    *,
    keep: bool = False,
    kept_bytes: int | None = None,
) -> KVRequest:
    """What KV stores are made from. Their fingerprint of the model is taken once."""
    checkpoint, exact = spec.checkpoint, pass_planner.exact

    @functools.cache
    def fingerprint() -> str:
        found = identity(checkpoint, spec.config, engine.progress.checked, exact=exact)
        remember_name(found, checkpoint.directory)
        return found

    device, host = accounts.device, accounts.host
    return KVRequest(spec.geometry, device, host, directory, fingerprint, keep, kept_bytes)


def _make_drafter(offer: Offer, spec: ModelSpec, model: StreamedModel) -> Drafter:
    """The draft source of a plugin. Raises PluginError."""
    request = DraftRequest(
        spec.config,
        spec.checkpoint.directory,
        spec.skeleton.config.vocab_size,
        model.tokenizer,
        str(spec.device),
        model.accounts.device,
        model.accounts.host,
    )
    # A Drafter is anything that can be called, which is what the answer is held against.
    drafter: Drafter = offer.make(collections.abc.Callable, request)  # type: ignore[arg-type]
    return drafter
