"""A small real checkpoint for weight streamers, and what it holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ollm_conformance.compare import same_bits
from ollm_conformance.seeds import drawn
from ollm_core import ParameterSource
from ollm_core.testing import (
    Checkpoint,
    Parameter,
    Units,
    WeightStreamer,
    WeightUnit,
    open_checkpoint,
)

NUM_LAYERS = 5
NUM_UNITS = NUM_LAYERS + 2
"""The layers, and the head in two parts."""


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint of two files, how it is cut into units, and what they hold."""

    checkpoint: Checkpoint
    units: Units
    expected: list[list[Tensor]]
    """Parameters of each unit in pass order, as stored."""
    embedding: Tensor
    experts: list[Tensor]
    """Weights of each routed expert of layer 1; none unless they were asked for."""

    @classmethod
    def write(
        cls,
        directory: Path,
        dtype: torch.dtype = torch.float32,
        scale: int = 1,
        num_experts: int = 0,
    ) -> Model:
        """Write random tensors of odd sizes, most in `dtype`, some stored the other way round. A
        layer is about 0.2 MB in float32, or `scale` times that, and an expert about 10 KB.
        """
        generator = drawn(11)

        def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        saved = {
            "head": random(301, 129, dtype=dtype), "norm": random(65), "embedding": random(57, 33),
        }  # fmt: skip
        plan: list[list[str]] = []
        for i in range(NUM_LAYERS):
            layer = {
                f"{i}.weight": random(201 * scale + i, 257, dtype=dtype),
                f"{i}.norm": random(64, dtype=torch.bfloat16),
                f"{i}.half": random(31, 49, dtype=torch.float16),
                f"{i}.turned": random(20, 30),
            }
            plan.append(list(layer)[i % 2 :] + list(layer)[: i % 2])
            saved |= layer
        experts = [random(33, 77, dtype=dtype) for _ in range(num_experts)]
        saved |= {f"expert.{i}": one for i, one in enumerate(experts)}
        _save(saved, directory)
        checkpoint = open_checkpoint(directory)
        layers = [_unit(checkpoint, names) for names in plan]
        rows = checkpoint.tensors["head"]
        cuts = [(0, 150), (150, 301)]
        head = [
            WeightUnit(
                f"head {a}:{b}",
                (Parameter("head", (b - a, 129), ParameterSource(("head",)), (rows.rows(a, b),)),),
            )
            for a, b in cuts
        ]
        expected = [[_value(saved[name], name) for name in names] for names in plan]
        expected += [[saved["head"][a:b]] for a, b in cuts]
        routed = tuple(_unit(checkpoint, [f"expert.{i}"]) for i in range(num_experts))
        units = Units(
            tuple(layers),
            tuple(head),
            _unit(checkpoint, ["norm"]),
            checkpoint.tensors["embedding"],
            {1: routed} if routed else {},
        )
        return cls(checkpoint, units, expected, saved["embedding"], experts)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all units as stored."""
        return sum(unit.file_bytes for unit in self.units.in_pass_order)

    def check(
        self, unit_idx: int, found: Sequence[Tensor], what: str, dtype: torch.dtype = torch.float32
    ) -> None:
        """Raises AssertionError unless `found` are the parameters of a unit."""
        told = f"{what}, unit {unit_idx}"
        expected = self.expected[unit_idx]
        assert len(found) == len(expected), (
            f"{told}: expected {len(expected)} parameters, got {len(found)}"
        )
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            same_bits(one, other.to(dtype), f"{told}, parameter {i}")

    def walk(
        self,
        streamer: WeightStreamer,
        what: str,
        dtype: torch.dtype = torch.float32,
        order: Iterable[int] = range(NUM_UNITS),
    ) -> None:
        """Acquire units, by default those of a pass, and check each."""
        for unit_idx in order:
            with streamer.acquire(unit_idx) as parameters:
                self.check(unit_idx, parameters, what, dtype)


def _save(saved: dict[str, Tensor], directory: Path) -> None:
    """Write `saved` as two shards."""
    shards = {"a.safetensors": {}, "b.safetensors": {}}  # type: dict[str, dict[str, Tensor]]
    for i, (name, tensor) in enumerate(saved.items()):
        shards["ab"[i * 2 // len(saved)] + ".safetensors"][name] = tensor
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text('{"model_type": "llama"}')


def _unit(checkpoint: Checkpoint, names: Sequence[str]) -> WeightUnit:
    """A unit of whole tensors; those called `turned` are transposed."""
    parameters = []
    for name in names:
        info = checkpoint.tensors[name]
        turned = name.endswith("turned")
        source = ParameterSource((name,), _turned if turned else None)
        shape = info.shape[::-1] if turned else info.shape
        parameters.append(Parameter(name, shape, source, (info,)))
    return WeightUnit("+".join(names), tuple(parameters))


def _value(stored: Tensor, name: str) -> Tensor:
    return _turned(stored) if name.endswith("turned") else stored
