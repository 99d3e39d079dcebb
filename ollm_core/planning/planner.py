"""The planner: makes dry runs of a model, times them, and compares other options."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path

from ollm_core.calibration.rates import fastest_blocks, find_rates
from ollm_core.checkpoint.hub import fetch_config
from ollm_core.checkpoint.locate import absent, is_repository, locate, may_be_id, models_root
from ollm_core.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    open_checkpoint,
    read_config,
)
from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.contracts.model import Config
from ollm_core.device.select import planned_device
from ollm_core.engine.torch_state import own_torch_state
from ollm_core.errors import InputError, OllmError
from ollm_core.files.paths import absolute
from ollm_core.memory.budgets import layer_limits, stated_budgets
from ollm_core.memory.collector import paused_collector
from ollm_core.model.spec import inspect_model
from ollm_core.options import PlanOptions, takes
from ollm_core.planning.advisor import Question
from ollm_core.planning.cost_model import Estimate
from ollm_core.planning.dry_run import DryRun, Scenario
from ollm_core.planning.plan import Plan
from ollm_core.plugins.registry import Registry
from ollm_core.values import PathLike, dtype_name, whole_number

DEFAULT_CONTEXT = 8192


@own_torch_state()
@takes(PlanOptions)
def plan(path_or_id: PathLike, options: PlanOptions) -> Plan:
    """Plan a run of the model in a directory, of a lone config.json, of a known id, or of a hub
    repository, whose config.json is then fetched alone: whether it fits, what it holds, how long it
    takes. Nothing is read but headers, nothing is allocated.

    Raises an OllmError for what cannot be planned; a run that does not fit is a plan that says so.
    """
    return Planner(path_or_id, options).plan()


class Planner:
    """One model, to be planned as often as wanted: what its layers take is found out once."""

    @paused_collector()
    def __init__(self, path_or_id: PathLike, options: PlanOptions) -> None:
        """See `plan`."""
        registry = options.registry or Registry.discover()
        self.options = options
        self._target = planned_device(options.device)
        found = _find(path_or_id, registry, options.models_dir)
        spec = inspect_model(
            found.adapter,
            found.config,
            found.checkpoint,
            registry.offers("ollm_weight_codecs"),
            dtype=dtype_name(options.dtype),
            device=self._target,
            where=found.where,
            precision=options.precision,
            bare=True,
        )
        blocks = fastest_blocks(self._target, spec.dtype)
        self._model = str(path_or_id)
        self._from_files = found.checkpoint is not None
        self._planned_from = found.source
        self._positions = spec.skeleton.max_positions
        self._rates = options.rates or find_rates(
            found.where, self._target, spec.dtype, options.precision
        )
        self._dry_run, self._estimate = DryRun(spec, blocks), Estimate(spec)

    @property
    def positions(self) -> int:
        """Most tokens of a sequence."""
        return self._positions

    def plan(self, options: PlanOptions | None = None, *, compare: bool = True) -> Plan:
        """See `plan`. Other `options` than those of the planner may differ in all but those that
        say which model it is, on which device, in which dtype, by which rates: ValueError.

        Without `compare` neither the largest context nor changes are looked for, which is quicker:
        0 and none.
        """
        options = options or self.options
        for name in ("device", "dtype", "models_dir", "registry", "rates"):
            if getattr(options, name) != getattr(self.options, name):
                raise ValueError(f"{name} is that of the planner: {getattr(self.options, name)!r}")
        budgets = stated_budgets(
            self._target, options.device_memory, options.host_memory, must_be_there=False
        )
        num_new = index(options.max_new_tokens)
        scenario = Scenario(
            self._length(whole_number(options.context), num_new),
            num_new,
            index(options.batch),
            options.kv,
            options.attention,
            whole_number(options.chunk_size),
            layer_limits(self._target, options.device_layers, options.host_layers),
        )
        question = Question(
            self._dry_run, self._estimate, self._rates, budgets, scenario, self._positions
        )
        answer = question.answer(self._model, from_files=self._from_files, compare=compare)
        return replace(answer, planned_from=self._planned_from)

    def _length(self, context: int | None, max_new_tokens: int) -> int:
        positions = self._positions
        length = min(DEFAULT_CONTEXT, positions) if context is None else context
        if length > positions:
            raise InputError(
                f"a context of {length} tokens is past the model's {positions} positions",
                hint=f"ask for at most {positions}",
            )
        if length <= max_new_tokens:
            raise InputError(
                f"a context of {length} tokens leaves no room for a prompt before "
                f"{max_new_tokens} new ones",
                hint="give a larger context, or a smaller max_new_tokens",
            )
        return length


@dataclass(frozen=True, slots=True)
class _Found:
    adapter: ModelAdapter
    config: Config
    checkpoint: Checkpoint | None
    where: Path
    source: str
    """What the plan goes by, in words."""


def _find(path_or_id: PathLike, registry: Registry, models_dir: PathLike | None) -> _Found:
    """The model's config, and its files if they are there. Of a hub repository that is neither here
    nor known, or known without a config, config.json is fetched.
    """
    path = absolute(path_or_id)
    if os.path.isdir(path):
        directory = path
    elif os.path.isfile(path) or path.suffix == ".json":
        config = read_config(path.parent, path.name)
        return _Found(registry.adapter_for(config), config, None, path, f"{path} alone")
    elif not may_be_id(os.fspath(path_or_id)):
        raise InputError(f"there is no directory {path}", hint="ollm list-models shows known ids")
    elif (found := locate(str(path_or_id), registry, models_dir)) is not None:
        directory = found
    else:
        return _find_absent(str(path_or_id), registry, models_dir)
    config = read_config(directory)
    adapter = registry.adapter_for(config)
    has_files = any((directory / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))
    checkpoint = open_checkpoint(directory) if has_files else None
    source = f"the files in {directory}" if has_files else f"config.json in {directory} alone"
    return _Found(adapter, config, checkpoint, directory, source)


def _find_absent(name: str, registry: Registry, models_dir: PathLike | None) -> _Found:
    """What is known of a model that is not here."""
    root = models_root(models_dir)
    known = registry.named(name)
    if known is not None and known[1].config:
        config = known[1].config
        return _Found(registry.adapter_for(config), config, None, root, "the catalog's config.json")
    repository = known[1].repo if known else name
    if not is_repository(repository):
        raise absent(name, registry, models_dir)
    try:
        fetched, source = fetch_config(repository)
    except OllmError as error:
        if known is not None:
            raise
        told = f"there is no directory {name}, and {error.message}"  # it may be meant as a path
        raise type(error)(told, hint=error.hint) from error
    return _Found(registry.adapter_for(fetched), fetched, None, root, source)
