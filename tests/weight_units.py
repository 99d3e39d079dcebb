"""Units of weights without a model around them."""

from __future__ import annotations

from ollm_core import ParameterSource
from ollm_core.checkpoint.safetensors import Checkpoint
from ollm_core.weights.units import Parameter, WeightUnit


def unit_of(checkpoint: Checkpoint, *names: str) -> WeightUnit:
    """A unit whose parameters are tensors as they are."""
    infos = [checkpoint.tensors[name] for name in names]
    return WeightUnit(
        "+".join(names),
        tuple(Parameter(t.name, t.shape, ParameterSource((t.name,)), (t,)) for t in infos),
    )
