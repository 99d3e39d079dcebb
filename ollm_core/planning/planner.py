"""What fits where, and how long it takes: a run is rehearsed, timed, and compared with others."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from ollm_core.attention.select import ATTENTIONS
from ollm_core.calibration.rates import Rates, fastest_blocks, find_rates
from ollm_core.checkpoint.hub import is_on_disk, local_path, may_be_id, models_root
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
from ollm_core.errors import InputError
from ollm_core.files.paths import absolute
from ollm_core.kv.factory import TIERS
from ollm_core.memory.budgets import layer_limits, stated_budgets
from ollm_core.model.spec import inspect_model
from ollm_core.options import Count, Device, DType, PathLike, Size, count, dtype_name, one_of
from ollm_core.planning.advisor import Question
from ollm_core.planning.cost_model import Estimate
from ollm_core.planning.dry_run import Rehearsal, Scenario
from ollm_core.planning.plan import Plan
from ollm_core.plugins.registry import Registry

DEFAULT_CONTEXT = 8192
_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmM]?)\s*")


@own_torch_state()
def plan(
    path_or_id: PathLike,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    context: str | Count | None = None,
    batch: Count = 1,
    max_new_tokens: Count = 256,
    kv: str = "auto",
    device_layers: Count | None = None,
    host_layers: Count | None = None,
    attention: str = "auto",
    chunk_size: Count | None = None,
    models_dir: PathLike | None = None,
    registry: Registry | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Plan a run of the model in a directory, of a lone config.json, or of a known id: whether it
    fits, what it holds, how long it takes. Nothing is read but headers, nothing is allocated.

    - `device`: as for `ollm.load`; "cuda" also where there is none, then with 8 GB by default.
    - `context`: tokens of each of `batch` sequences at the end, `max_new_tokens` included, as
      `100k` or an int. Default: 8,192, or what the model has.
    - `rates`: what the times are made from. Default: what `ollm doctor` has measured here.
    - The rest is as for `ollm.load`.

    Raises an OllmError for what cannot be planned; a run that does not fit is a plan that says so.
    """
    planner = Planner(
        path_or_id,
        device=device,
        dtype=dtype,
        models_dir=models_dir,
        registry=registry,
        rates=rates,
    )
    return planner.plan(
        device_memory=device_memory,
        host_memory=host_memory,
        context=context,
        batch=batch,
        max_new_tokens=max_new_tokens,
        kv=kv,
        device_layers=device_layers,
        host_layers=host_layers,
        attention=attention,
        chunk_size=chunk_size,
    )


class Planner:
    """One model, to be planned as often as wanted: what its layers take is found out once."""

    def __init__(
        self,
        path_or_id: PathLike,
        *,
        device: Device = "auto",
        dtype: DType = "auto",
        models_dir: PathLike | None = None,
        registry: Registry | None = None,
        rates: Rates | None = None,
    ) -> None:
        """See `plan`."""
        registry = registry or Registry.discover()
        self._target = planned_device(device)
        computing = dtype_name(dtype)
        found = _find(path_or_id, registry, models_dir)
        spec = inspect_model(
            found.adapter,
            found.config,
            found.checkpoint,
            registry.offers("ollm_weight_codecs"),
            dtype=computing,
            device=self._target,
            where=found.where,
            bare=True,
        )
        blocks = fastest_blocks(self._target, spec.dtype)
        self._model = str(path_or_id)
        self._from_files = found.checkpoint is not None
        self._positions = int(spec.skeleton.config.max_position_embeddings)
        self._rates = rates or find_rates(found.where, self._target, spec.dtype)
        self._rehearsal, self._estimate = Rehearsal(spec, blocks), Estimate(spec)

    def plan(
        self,
        *,
        device_memory: Size | None = None,
        host_memory: Size | None = None,
        context: str | Count | None = None,
        batch: Count = 1,
        max_new_tokens: Count = 256,
        kv: str = "auto",
        device_layers: Count | None = None,
        host_layers: Count | None = None,
        attention: str = "auto",
        chunk_size: Count | None = None,
        compare: bool = True,
    ) -> Plan:
        """See `plan`. Without `compare` neither the largest context nor changes are looked for,
        which is quicker: 0 and none.
        """
        one_of("kv", kv, ("auto", *TIERS))
        one_of("attention", attention, ("auto", *ATTENTIONS))
        num_rows = count("batch", batch, 1)
        num_new = count("max_new_tokens", max_new_tokens, 1)
        chunk = None if chunk_size is None else count("chunk_size", chunk_size, 1)
        budgets = stated_budgets(self._target, device_memory, host_memory, must_be_there=False)
        layers = layer_limits(self._target, device_layers, host_layers)
        length = self._length(context, num_new)
        question = Question(
            self._rehearsal,
            self._estimate,
            self._rates,
            budgets,
            Scenario(length, num_new, num_rows, kv, attention, chunk, layers),
            self._positions,
        )
        return question.answer(self._model, from_files=self._from_files, compare=compare)

    def _length(self, context: str | Count | None, max_new_tokens: int) -> int:
        positions = self._positions
        length = min(DEFAULT_CONTEXT, positions) if context is None else parse_tokens(context)
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


def parse_tokens(text: str | Count) -> int:
    """A number of tokens from `100k` (100,000), `1M`, or a plain number. Raises InputError."""
    match = _COUNT.fullmatch(str(text))
    number = 0
    if match:
        number = int(Decimal(match[1]) * {"": 1, "k": 1000, "m": 1_000_000}[match[2].lower()])
    if number < 1:
        raise InputError(
            f"{str(text)!r} is not a number of tokens", hint="write it as in 8192 or 100k"
        )
    return number


@dataclass(frozen=True, slots=True)
class _Found:
    adapter: ModelAdapter
    config: Config
    checkpoint: Checkpoint | None
    where: Path


def _find(path_or_id: PathLike, registry: Registry, models_dir: PathLike | None) -> _Found:
    """The model's config, and its files if they are there."""
    path = absolute(path_or_id)
    if os.path.isdir(path):
        directory = path
    elif os.path.isfile(path) or path.suffix == ".json":
        config = read_config(path.parent, path.name)
        return _Found(registry.adapter_for(config), config, None, path)
    elif not may_be_id(os.fspath(path_or_id)):
        raise InputError(f"there is no directory {path}", hint="ollm list-models shows known ids")
    elif is_on_disk(str(path_or_id), models_dir):
        directory = local_path(str(path_or_id), models_dir)
    else:
        adapter, entry = registry.find(str(path_or_id))
        if not is_on_disk(entry.id, models_dir):
            return _Found(adapter, entry.config, None, models_root(models_dir))
        directory = local_path(entry.id, models_dir)
    config = read_config(directory)
    adapter = registry.adapter_for(config)
    has_files = any((directory / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))
    return _Found(adapter, config, open_checkpoint(directory) if has_files else None, directory)
