"""What adapters declare, asked as opening a model does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.kv import CacheKind
from ollm_core.contracts.model import Config, Layout
from ollm_core.engine.activations import Workspace
from ollm_core.errors import OllmError
from ollm_core.files.untrusted_json import parse_object
from ollm_core.model.own_skeleton import OwnSkeleton
from ollm_core.model.skeleton import Skeleton
from ollm_core.model.spec import ModelSpec, inspect_model
from ollm_core.plugins.limited import LimitedAdapter
from ollm_core.plugins.registry import Registry
from ollm_core.plugins.validation import kinds_of, layout_of, plan_of, text_config_of
from ollm_core.weights.formats.codecs import LogicalTensors, as_stored


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
        one = adapter.for_model(config)
        if not layout_of(one, text_config).own_forward:
            return adapter
        return _Opened(one, text_config)
    except OllmError:
        return adapter


class _Opened(LimitedAdapter):
    def __init__(self, adapter: ModelAdapter, text_config: Config) -> None:
        self._kinds = functools.lru_cache(maxsize=None)(self._look_at)
        self._adapter = adapter
        super().__init__(adapter, self._followed(text_config).limits)

    def caches(self, config: Config) -> Sequence[CacheKind]:
        return self._kinds(_stated(config))

    def _look_at(self, stated: str) -> Sequence[CacheKind]:
        return self._followed(parse_object(stated.encode())).kinds

    def _followed(self, config: Config) -> OwnSkeleton:
        dtype, device = torch.bfloat16, torch.device("meta")
        layout = self._adapter.layout(config)
        model = self._adapter.built_model(config, dtype)
        return OwnSkeleton(config, layout, dtype, device, model=model)


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
    Workspace.of(spec_of(adapter, directory, registry, "auto"))


def spec_of(adapter: ModelAdapter, directory: Path, registry: Registry, dtype: str) -> ModelSpec:
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
