"""A model that is run: passes, its parameters, and what of them is kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ollm_core.contracts.kv import KVStore
from ollm_core.contracts.model import Layout
from ollm_core.contracts.tensors import TensorInfo
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.checkpoint import CheckpointPolicy, can_go_on
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.planning.dry_run import DryRun
from ollm_core.serving.scheduler import Scheduler

_ROOM = 1 << 29


def run_pass(model: StreamedModel, store: KVStore, work: Sequence[NewTokens]) -> list[Tensor]:
    """One weight pass over the new tokens of some sequences of `store`, with no padding: logits
    [num_logits, V] of each. Raises what a pass raises, and the store is then as before.
    """
    return model.engine.run(store, work)


def limit_running(scheduler: Scheduler, number: int) -> None:
    """Let at most so many texts of a scheduler run at a time: others wait."""
    scheduler._model = replace(scheduler._model, max_running=number)


def save_each_layer(model: StreamedModel) -> bool:
    """Let long prompts of a model, with KV on disk that is kept, write how far they are after each
    layer, however quick that was. Returns whether they can be gone on with: not where layers hand
    on more than hidden states.
    """
    model.engine.checkpoints = CheckpointPolicy(least_tokens=1, after_seconds=0, share=float("inf"))
    return can_go_on(model.engine._skeleton)


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
