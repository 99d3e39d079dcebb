"""What tests of adapters and of other parts need of the core, in one place that stays: checkpoints
and declarations, models that are run, faults, and what is held and planned.

`ollm_conformance` imports nothing else of the core but `ollm_core` itself, and a test of your own
need not either. Importing this imports torch; `import ollm_core` does not import it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ollm_core.checkpoint.safetensors import Checkpoint, open_checkpoint, read_config
from ollm_core.checkpoint.synthetic import STORED_DTYPES
from ollm_core.contracts.adapter import ADAPTER_API, ModelAdapter
from ollm_core.contracts.attention import Attention, KVView
from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import CacheKind, KeepsStates, KVStore
from ollm_core.contracts.model import Capability, Config, Layout
from ollm_core.contracts.progress import Progress
from ollm_core.contracts.tensors import DTYPE_BYTES, TensorInfo
from ollm_core.contracts.weights import WeightStreamer
from ollm_core.device.buffers import PAGE, aligned_buffer, as_memoryview
from ollm_core.device.offload import host_like
from ollm_core.engine.activations import Workspace
from ollm_core.engine.batch import NewTokens
from ollm_core.errors import NotFiniteError, OllmError, PluginError, ReadError
from ollm_core.files.untrusted_json import parse_object
from ollm_core.generate.cache import SequenceCache
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.memory.budgets import Budgets
from ollm_core.memory.tracker import AllocationTracker
from ollm_core.model.own_skeleton import OwnSkeleton
from ollm_core.model.skeleton import Skeleton, check_paths
from ollm_core.model.spec import ModelSpec, inspect_model
from ollm_core.planning.dry_run import DryRun, Scenario
from ollm_core.plugins.limited import LimitedAdapter
from ollm_core.plugins.registry import Registry, supports
from ollm_core.plugins.validation import (
    check_capability,
    kinds_of,
    layout_of,
    plan_of,
    text_config_of,
    told,
)
from ollm_core.products.select import without_instructions
from ollm_core.weights.formats.codecs import LogicalTensors, as_stored
from ollm_core.weights.units import Parameter, Units, WeightUnit

__all__ = [
    "ADAPTER_API",
    "DTYPE_BYTES",
    "PAGE",
    "STORED_DTYPES",
    "Attention",
    "Checkpoint",
    "Closing",
    "DryRun",
    "KVView",
    "KeepsStates",
    "LogicalTensors",
    "NewTokens",
    "NotFiniteError",
    "Parameter",
    "PlannedRun",
    "PluginError",
    "Progress",
    "Registry",
    "SequenceCache",
    "StreamedModel",
    "TierTracker",
    "Units",
    "WeightStreamer",
    "WeightUnit",
    "aligned_buffer",
    "as_memoryview",
    "as_opened",
    "bound_parameters",
    "check_capability",
    "check_declarations",
    "check_halves",
    "check_model",
    "check_paths",
    "counted_reads",
    "described_tensors",
    "failing_reads",
    "hold_weights",
    "logical_tensors",
    "open_checkpoint",
    "open_dry_run",
    "parse_object",
    "plan_run",
    "read_config",
    "run_pass",
    "share_traces",
    "supports",
    "told",
    "weight_tensors",
    "without_instructions",
]

_STORES = "ollm_core.kv."
_DEPTH = 13
"""Frames between an allocation and what asked for it."""
_ROOM = 1 << 29


# Declarations


def check_declarations(
    adapter: ModelAdapter, config: Config, names_of: Callable[[Config], Iterable[str]]
) -> None:
    """Ask an adapter for all that it declares of a config.json, as opening a model does.

    `names_of` gives the names of the checkpoint's tensors for the text config. Raises PluginError
    for what is not what it is called, ConfigError and others as the adapter does.
    """
    text_config = text_config_of(adapter, config)
    layout = layout_of(adapter, text_config)
    kinds_of(adapter, text_config, layout)
    plan_of(adapter, text_config, names_of(text_config))


def as_opened(adapter: ModelAdapter, config: Config) -> ModelAdapter:
    """The adapter of a config.json with what opening a model adds: where that is left to the
    model's own forward, the caches that core finds, and what the model cannot do. Else, or where it
    cannot be opened, `adapter` itself.
    """
    try:
        text_config = text_config_of(adapter, config)
        if not layout_of(adapter, text_config).own_forward:
            return adapter
        return _Opened(adapter, text_config)
    except OllmError:
        return adapter


class _Opened(LimitedAdapter):
    def __init__(self, adapter: ModelAdapter, text_config: Config) -> None:
        self._looked_at = functools.lru_cache(maxsize=None)(self._look_at)
        self._adapter = adapter
        super().__init__(adapter, self._looked_at(_stated(text_config))[1])

    def caches(self, config: Config) -> Sequence[CacheKind]:
        return self._looked_at(_stated(config))[0]

    def _look_at(self, stated: str) -> tuple[Sequence[CacheKind], Mapping[str, Capability]]:
        config = json.loads(stated)
        found = OwnSkeleton(
            config, self._adapter.layout(config), torch.bfloat16, torch.device("meta")
        )
        return found.kinds, found.limits


def _stated(config: Config) -> str:
    return json.dumps(dict(config), sort_keys=True)


def logical_tensors(directory: Path) -> LogicalTensors:
    """The tensors of a checkpoint as an adapter is told of them: `names`, and what is `stored` for
    each. Raises CheckpointError.
    """
    return LogicalTensors(open_checkpoint(directory), read_config(directory), {})


def described_tensors(
    adapter: ModelAdapter, config: Config, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> Mapping[str, tuple[str, tuple[int, ...]]] | None:
    """safetensors dtype and shape of the tensors that a plan without files takes a checkpoint of a
    text config to hold: those that the adapter declares, in the form that the config states.

    Arguments are those of `tensors()`. None where that says nothing.
    """
    declared = adapter.tensors(config, shapes, dtype)
    return None if declared is None else as_stored(config, declared, {})


def check_model(config: Config, layout: Layout) -> None:
    """Raises UnsupportedError, or another OllmError, if the transformers model of a text config
    computes what the core cannot run with this layout. Nothing is allocated.
    """
    kind = OwnSkeleton if layout.own_forward else Skeleton
    kind(config, layout, torch.bfloat16, torch.device("meta"))


def check_halves(adapter: ModelAdapter, directory: Path, registry: Registry) -> None:
    """Raises UnsupportedError if the two halves in which a layer with routed experts is run do not
    compute what the layer of transformers does.
    """
    Workspace.of(_spec(adapter, directory, registry, "auto"))


# A model that is run


def run_pass(model: StreamedModel, store: KVStore, work: Sequence[NewTokens]) -> list[Tensor]:
    """One weight pass over the new tokens of some sequences of `store`, with no padding: logits
    [num_logits, V] of each. Raises what a pass raises, and the store is then as before.
    """
    return model.engine.run(store, work)


def share_traces(
    model: StreamedModel | DryRun, traces: MutableMapping[Hashable, Any], key: str
) -> None:
    """Let a model, or the plan of one, use, and add to, what was traced for those before it that
    had the same `key`, for instance the text of config.json, dtype and device: opening a tiny model
    takes most of its time for that. `traces` is empty at first.
    """
    if isinstance(model, DryRun):
        workspace = model._workspace
        whole = key, str(model.spec.dtype), str(model.spec.device)
    else:
        workspace = model.engine._pass_planner._workspace
        whole = key, str(model.dtype), str(model.device)
    mine = workspace._known, workspace._known_mixtures
    workspace._known, workspace._known_mixtures = traces.setdefault(whole, mine)


def bound_parameters(model: StreamedModel, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its full name, whole, as the engine gets it: on the compute device, in the
    compute dtype, after transforms.
    """
    vocab_size = model.config.get_text_config().vocab_size
    yield f"{layout.embedding}.weight", model.weights.embed(torch.arange(vocab_size))
    own = layout.own_forward
    outer = model.engine._skeleton.outer if own else [f"{layout.norm}.weight"]
    yield from zip(outer, model.weights.norm, strict=own)
    head: dict[str, list[Tensor]] = {}
    for unit_idx, unit in enumerate(model.weights.units):
        with model.weights.acquire(unit_idx) as parameters:
            for parameter, value in zip(unit.parameters, parameters, strict=True):
                if unit_idx < layout.num_layers:
                    yield parameter.name, value.clone()
                else:
                    head.setdefault(parameter.name, []).append(value.clone())
    for name, values in head.items():
        yield name, torch.cat(values)
    for layer_idx, experts in model.weights.expert_units.items():
        slices: dict[str, list[Tensor]] = {}
        with model.weights.experts(layer_idx, range(len(experts))) as found:
            for i, parameters in found:
                for parameter, value in zip(experts[i].parameters, parameters, strict=True):
                    name = parameter.name.removesuffix(f"[{i}]")
                    slices.setdefault(name, []).append(value.clone())
        for name, values in slices.items():
            yield name, torch.stack(values)


def weight_tensors(model: StreamedModel) -> list[TensorInfo]:
    """The tensors that a weight pass reads where nothing is kept: once for each layer, part of the
    head or routed expert that needs them.
    """
    weights = model.weights
    units = [*weights.units, *(one for experts in weights.expert_units.values() for one in experts)]
    return [tensor for unit in units for tensor in unit.tensors]


def hold_weights(model: StreamedModel, *, all_of_them: bool) -> None:
    """Keep all weights of a tiny model in memory, or as few as it can run with, until the next pass
    decides for itself.
    """
    num_bytes = _ROOM if all_of_them else model.weights.least_bytes(0)
    model.weights.fit(num_bytes, num_bytes)


# Reads that are watched, and reads that fail


@contextmanager
def counted_reads(model: StreamedModel) -> Iterator[Counter[str]]:
    """How often each tensor is asked of the model's reading engine in the `with` block."""
    seen: Counter[str] = Counter()

    def note(tensors: Sequence[TensorInfo]) -> None:
        seen.update(tensor.name for tensor in tensors)

    with _before_reads(model, note):
        yield seen


@contextmanager
def failing_reads(model: StreamedModel, after: int = 0) -> Iterator[None]:
    """In the `with` block every read of the model's reading engine is a ReadError, "the disk is
    gone", once `after` of them were made. What was read ahead is still there.
    """
    left = iter(range(after))

    def fail(_: Sequence[TensorInfo]) -> None:
        if next(left, None) is None:
            raise ReadError("the disk is gone")

    with _before_reads(model, fail):
        yield


@contextmanager
def _before_reads(
    model: StreamedModel, look: Callable[[Sequence[TensorInfo]], None]
) -> Iterator[None]:
    source = model.weights._source
    real = source.read

    def read(tensors: Sequence[TensorInfo], buffer: memoryview) -> Sequence[int]:
        look(tensors)
        return real(tensors, buffer)

    source.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        source.read = real  # type: ignore[method-assign]


# What is planned, and what is held


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run as a plan tells it, in bytes."""

    device_memory: int
    """The limits that the run is given."""
    host_memory: int
    device_peak: int
    """The most that it will hold."""
    host_peak: int


def open_dry_run(
    adapter: ModelAdapter,
    directory: Path,
    registry: Registry,
    dtype: str = "auto",
    make: Callable[[ModelSpec], DryRun] = DryRun,
) -> DryRun:
    """What plans runs of the model in `directory` on a CPU, by the code of `ollm plan`. Nothing is
    allocated and only headers are read. `make` is for testing a test: a subclass that plans wrong.
    """
    return make(_spec(adapter, directory, registry, dtype))


def plan_run(
    dry_run: DryRun,
    *,
    num_tokens: int,
    num_new: int,
    kv: str,
    chunk_size: int | None,
    roomy: bool,
) -> PlannedRun:
    """Plan a run of one sequence of `num_tokens`, the last `num_new` of them generated, with exact
    attention: in the least memory that it takes or, `roomy`, with half of the checkpoint more on
    the device and twice as much on the host.
    """
    scenario = Scenario(num_tokens, num_new, 1, kv, "exact", chunk_size)
    budgets = dry_run.least(scenario, Budgets(1, 1))
    if roomy:
        more = dry_run.spec.checkpoint.total_bytes // 2
        budgets = Budgets(budgets.device + more, 2 * budgets.host)
    found = dry_run.run(budgets, scenario)
    return PlannedRun(
        budgets.device,
        budgets.host,
        found.device_peak.device_bytes,
        found.host_peak.host_bytes,
    )


class TierTracker(AllocationTracker):
    """Counts what is allocated on a CPU inside the `with` block, whatever the accounts say: of the
    device, and apart from it of the host, which on a CPU differ only in what the memory is for.

    `used` and `peak` are the device's, `host_used` and `host_peak` the host's: that is what KV
    stores allocate, if KV is not on the device, and hidden states that are offloaded there. What is
    not made by a torch operation, as pages for O_DIRECT, is not seen.
    """

    def __init__(self, *, kv_on_device: bool) -> None:
        super().__init__("cpu")
        self.host_used = 0
        self.host_peak = 0
        self._kv_on_device = kv_on_device
        self._on_host: set[int] = set()

    def _count(self, storage: torch.UntypedStorage, *, made_here: bool = True) -> None:
        peak, used = self.peak, self.used
        super()._count(storage, made_here=made_here)
        if self.used > used and self._is_for_host():
            self._on_host.add(storage._cdata)
            self.host_used += self.used - used
            self.host_peak = max(self.host_peak, self.host_used)
            self.peak, self.used = peak, used

    def _forget(self, key: int, num_bytes: int) -> None:
        super()._forget(key, num_bytes)
        if key in self._on_host:
            self._on_host.remove(key)
            self.host_used -= num_bytes
            self.used += num_bytes

    def _is_for_host(self) -> bool:
        """Who asked for the allocation that is being counted."""
        frame: FrameType | None = sys._getframe(2)
        for _ in range(_DEPTH):
            if frame is None:
                return False
            if frame.f_code is host_like.__code__:
                return True
            if str(frame.f_globals.get("__name__", "")).startswith(_STORES):
                return not self._kv_on_device
            frame = frame.f_back
        return False


def _spec(adapter: ModelAdapter, directory: Path, registry: Registry, dtype: str) -> ModelSpec:
    """What a model on a CPU is, nothing of it read but headers."""
    return inspect_model(
        adapter,
        read_config(directory),
        open_checkpoint(directory),
        registry.offers("ollm_weight_codecs"),
        dtype=dtype,
        device=torch.device("cpu"),
        where=directory,
        bare=True,
    )
