"""What the engine is given of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ollm_core import Layout
from ollm_core.generate.causal_lm import StreamedModel


def bound_parameters(model: StreamedModel, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every parameter as the engine gets it, whole."""
    vocab_size = model.config.get_text_config().vocab_size
    yield f"{layout.embedding}.weight", model.weights.embed(torch.arange(vocab_size))
    yield f"{layout.norm}.weight", model.weights.norm[0]
    head: list[Tensor] = []
    for unit_idx, unit in enumerate(model.weights.units):
        with model.weights.acquire(unit_idx) as parameters:
            for parameter, value in zip(unit.parameters, parameters, strict=True):
                if unit_idx < layout.num_layers:
                    yield parameter.name, value.clone()
                else:
                    head.append(value.clone())
    yield f"{layout.head}.weight", torch.cat(head)
    for layer_idx, experts in model.weights.expert_units.items():
        slices: dict[str, list[Tensor]] = {}
        with model.weights.experts(layer_idx, range(len(experts))) as found:
            for i, parameters in found:
                for parameter, value in zip(experts[i].parameters, parameters, strict=True):
                    name = parameter.name.removesuffix(f"[{i}]")
                    slices.setdefault(name, []).append(value.clone())
        for name, values in slices.items():
            yield name, torch.stack(values)
