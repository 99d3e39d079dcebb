"""Whether a model fits this machine, at a glance: without torch, from config.json and a size.

An estimate, for lists. `ollm plan` is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ollm_core.contracts.model import Config
from ollm_core.memory.budgets import Budgets, default_shares
from ollm_core.memory.gpu import first_gpu

Fit = Literal["in memory", "streamed", "no: memory", "no: disk", "unknown"]
"""Weights read once and kept; read from the disk in each pass; more than the memory can stream; no
room on the disk to fetch them; a model whose size is not known.
"""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WEIGHTS_PART = 0.9
"""Of the memory, what weights may take: the rest is for the KV cache and activations."""
_BESIDE_BYTES = 250_000_000
"""What a pass takes beside layers, and what it takes at least of a mixture's layer."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on."""

    has_gpu: bool
    budgets: Budgets
    """The default limits."""
    free_disk: int
    """Bytes, where models are kept."""

    @classmethod
    def here(cls, free_disk: int) -> Machine:
        """This machine, as it is now."""
        gpu = first_gpu()
        return cls(gpu is not None, default_shares(gpu[0] if gpu else None), free_disk)

    def fits(self, config: Config, weight_bytes: int, *, on_disk: bool) -> Fit:
        """How a model with that config.json, which may be empty, would run."""
        if weight_bytes <= 0:
            return "unknown"
        if not on_disk and weight_bytes > self.free_disk:
            return "no: disk"
        least = least_bytes(config, weight_bytes, has_gpu=self.has_gpu)
        if least.device > self.budgets.device or least.host > self.budgets.host:
            return "no: memory"
        room = self.budgets.device + (self.budgets.host if self.has_gpu else 0)
        return "in memory" if weight_bytes <= room * _WEIGHTS_PART else "streamed"


def least_bytes(config: Config, weight_bytes: int, *, has_gpu: bool) -> Budgets:
    """About the smallest limits in which the weights can be streamed: a layer on the GPU and three
    on their way there, or two in the memory of a CPU. Of routed experts a few are read at a time.
    """
    text = config.get("text_config")
    whole: Config = {**config, **text} if isinstance(text, Mapping) else config
    layers = _number(whole, "num_hidden_layers") or 1
    table = _number(whole, "vocab_size") * _number(whole, "hidden_size") * 2
    tables = table if whole.get("tie_word_embeddings") else 2 * table
    layer = max(weight_bytes - tables, weight_bytes // 10) // layers
    if any(_number(whole, key) > 1 for key in _EXPERTS):
        layer = min(layer, _BESIDE_BYTES)
    device, host = (layer, 3 * layer + _BESIDE_BYTES) if has_gpu else (2 * layer, _BESIDE_BYTES)
    return Budgets(device + _BESIDE_BYTES // 4, host)


def _number(config: Config, key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and 0 < value < 1 << 40 else 0
