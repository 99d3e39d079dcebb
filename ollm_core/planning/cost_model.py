"""The cost model: how long a simulated run takes, from what each pass moves and computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ollm_core.calibration.rates import Rates
from ollm_core.contracts.kv import CacheKind
from ollm_core.device.offload import ActivationOffload
from ollm_core.model.spec import ModelSpec
from ollm_core.planning.dry_run import DryRunResult, Scenario

_CONVERSION = 2  # a converted byte is written, and read where it comes from
_SCORE_PASSES = 8  # of exact attention over its scores: scaled, masked, normalised, cast, each anew


@dataclass(frozen=True, slots=True)
class PassCost:
    """What one weight pass takes of the machine, all of it at the same time."""

    disk_bytes: float
    """Read from disk: weights, and KV that lies there."""
    bus_bytes: float
    """Moved from the host to the device."""
    memory_bytes: float
    """Weights, KV and large copies of them that the device goes through."""
    flops: float
    converting_seconds: float = 0.0
    """Of making weights from what is stored, where that takes more than moving them. It counts as
    compute: the same cores do it.
    """

    def seconds(self, rates: Rates) -> dict[str, float]:
        """By what would limit the pass if the rest were free."""
        found = {
            "disk": self.disk_bytes / rates.disk.per_second,
            "compute": self.flops / rates.compute.per_second + self.converting_seconds,
            "memory": self.memory_bytes / rates.memory.per_second,
        }
        if rates.bus is not None:
            found["bus"] = self.bus_bytes / rates.bus.per_second
        return found


def slowest(seconds: Mapping[str, float]) -> tuple[str, float]:
    """The name of the largest, and it."""
    name = max(seconds, key=lambda key: seconds[key])
    return name, seconds[name]


class Estimate:
    """The passes of one model. Sizes are taken from it once."""

    def __init__(self, spec: ModelSpec) -> None:
        units, itemsize = spec.units, spec.dtype.itemsize
        self._kinds = [kind for kind in spec.kinds if kind.has_keys]
        self._itemsize = itemsize
        self._num_heads = int(getattr(spec.skeleton.config, "num_attention_heads", 0) or 0)
        self._layers = sum(p.num_bytes(spec.dtype) for u in units.layers for p in u.parameters)
        self._head = sum(p.num_bytes(spec.dtype) for u in units.head for p in u.parameters)
        self._stored = sum(unit.file_bytes for unit in units.in_pass_order)
        self._counts = [len(layer) for layer in units.experts.values()]
        one = next((layer[0] for layer in units.experts.values()), None)
        self._expert = sum(p.num_bytes(spec.dtype) for p in one.parameters) if one else 0
        self._expert_stored = one.file_bytes if one else 0
        self._seconds = sum(unit.seconds for unit in units.in_pass_order)
        self._expert_seconds = one.seconds if one else 0.0
        self._num_chosen = _experts_per_token(spec)

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers."""
        return sum(self._counts)

    def distinct_experts(self, num_tokens: int) -> float:
        """Of all layers, how many are expected to be wanted by any of `num_tokens`, if all are
        equally likely.
        """
        return sum(
            count * (1 - (1 - self._num_chosen / count) ** num_tokens) for count in self._counts
        )

    def prompt(self, run: DryRunResult, scenario: Scenario) -> PassCost:
        """The first pass, which reads everything once."""
        num_tokens = scenario.batch * scenario.prompt_tokens
        distinct = self.distinct_experts(num_tokens)
        weights = self._stored + distinct * self._expert_stored
        past = range(0, scenario.prompt_tokens, run.chunk_size)
        kv = scenario.batch * sum(self._kv_bytes(start) for start in past)
        pairs = sum(self._seen(kind.window, scenario.prompt_tokens) for kind in self._kinds)
        copies: float = _CONVERSION * run.held.converted_bytes
        if run.attention == "exact":  # sees all keys at once, later ones too, and hides those
            ends = [min(start + run.chunk_size, scenario.prompt_tokens) for start in past]
            pairs = sum(
                (end - start) * self._span(kind, end)
                for start, end in zip(past, ends, strict=True)
                for kind in self._kinds
            )
            copies += scenario.batch * sum(self._exact_bytes(end) for end in ends)
            scores = scenario.batch * self._num_heads * pairs * self._itemsize
            copies += _SCORE_PASSES * scores
        return PassCost(
            weights + kv * (run.kv_tier == "disk"),
            weights + kv * (run.kv_tier != "device"),
            self._layers + self._head + distinct * self._expert + copies,
            self._flops(num_tokens, scenario.batch) + self._attention(scenario.batch * pairs),
            self._seconds + distinct * self._expert_seconds,
        )

    def token(self, run: DryRunResult, scenario: Scenario) -> PassCost:
        """A decode step at the end, for one new token of each sequence."""
        held, batch = run.held, scenario.batch
        distinct = self.distinct_experts(batch)
        every = max(self.num_experts, 1)
        on_device = held.num_device_experts / every
        kept = on_device + held.num_host_experts / every
        kv = batch * self._kv_bytes(scenario.context)
        read = held.streamed_bytes + distinct * (1 - kept) * self._expert_stored
        moved = distinct * (1 - on_device) * self._expert_stored
        seen = sum(self._span(kind, scenario.context) for kind in self._kinds)
        copies: float = _CONVERSION * held.converted_bytes
        if run.attention == "exact":
            copies += batch * self._exact_bytes(scenario.context)
        return PassCost(
            read + kv * (run.kv_tier == "disk"),
            held.streamed_bytes + held.dense_host_bytes + moved + kv * (run.kv_tier != "device"),
            self._layers + self._head + distinct * self._expert + kv + copies,
            self._flops(batch, batch) + self._attention(batch * seen),
            held.converting_seconds + distinct * (1 - on_device) * self._expert_seconds,
        )

    def kv_bytes(self, scenario: Scenario) -> int:
        """Keys and values of all sequences at the end."""
        return scenario.batch * self._kv_bytes(scenario.context)

    def _kv_bytes(self, num_tokens: int) -> int:
        """Of one sequence, what attention sees after so many tokens."""
        return sum(
            2 * kind.num_kv_heads * kind.head_dim * self._itemsize * self._span(kind, num_tokens)
            for kind in self._kinds
        )

    def _exact_bytes(self, num_tokens: int) -> int:
        """What exact attention moves beside reading KV once: all of it is written in one piece, and
        then for each query head, and read again.
        """
        found = 0
        for kind in self._kinds:
            heads = kind.num_kv_heads + 2 * self._num_heads
            size = 2 * heads * kind.head_dim * self._itemsize
            found += size * self._span(kind, num_tokens)
        return found

    @staticmethod
    def _span(kind: CacheKind, num_tokens: int) -> int:
        """Tokens of so many that a layer's attention sees."""
        return min(num_tokens, kind.window or num_tokens)

    def _flops(self, num_tokens: int, num_logits: int) -> float:
        active = self._layers + len(self._counts) * self._num_chosen * self._expert
        return 2 * (num_tokens * active + num_logits * self._head) / self._itemsize

    def _attention(self, pairs: float) -> float:
        head_dim = max((kind.head_dim for kind in self._kinds), default=0)
        return 4 * self._num_heads * head_dim * pairs

    @staticmethod
    def _seen(window: int | None, num_tokens: int) -> float:
        """Pairs of a query and a key of one layer."""
        span = min(window or num_tokens, num_tokens)
        return span * (span + 1) / 2 + (num_tokens - span) * span


def _experts_per_token(spec: ModelSpec) -> int:
    """How many the router chooses, asked without data."""
    meta = torch.device("meta")
    for mixture in spec.skeleton.mixtures.values():
        hidden = torch.empty(1, 1, spec.skeleton.config.hidden_size, dtype=spec.dtype, device=meta)
        with torch.no_grad():
            return mixture.route(hidden, ActivationOffload(meta, on_host=False)).tokens.numel()
    return 0
