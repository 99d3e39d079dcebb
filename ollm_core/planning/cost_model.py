"""The cost model: how long a simulated run takes, from what each pass moves and computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ollm_core.calibration.products import flop_rate, seconds_per_weight
from ollm_core.calibration.rates import Rates
from ollm_core.contracts.kv import CacheKind
from ollm_core.device.offload import ActivationOffload
from ollm_core.kv.tiers import TIERS
from ollm_core.model.spec import ModelSpec
from ollm_core.planning.dry_run import DryRunResult, Scenario
from ollm_core.weights.units import WeightUnit

_CONVERSION = 2  # a converted byte is written, and read where it comes from
# What these take beside products and attention, in calls of transformers' layer: a layer with the
# engine's work for it, an expert, a block of a past.
_ENGINE_CALL, _EXPERT_CALL, _BLOCK_CALL = 2.0, 0.5, 0.25
_BLOCK_TOKENS = 256
_SCORE_PASSES = 8  # of exact attention over its scores: scaled, masked, normalised, cast, each anew


@dataclass(frozen=True, slots=True)
class Product:
    """Weights that are multiplied by so many rows of states at a time, so often."""

    weights: float
    rows: float
    times: float = 1


@dataclass(frozen=True, slots=True)
class PassCost:
    """What one weight pass takes of the machine. Disk, bus and device work at the same time; what
    the device does comes one after the other.
    """

    disk_bytes: float
    """Read from disk: weights, and KV that lies there."""
    bus_bytes: float
    """Moved from the host to the device."""
    memory_bytes: float
    """Large copies of weights and KV that the device goes through."""
    products: Sequence[Product]
    attention: float
    """FLOP of it, with `new_tokens` of a sequence at a time."""
    new_tokens: int
    head_dim: int
    exact_attention: bool
    """It is products in the compute dtype, not blocks in float32."""
    layer_calls: float
    """Times that a layer is called, or as much is done beside products and attention."""
    numbers: float
    """Outputs of all products, and of attention over each block, for all tokens."""
    converting_seconds: float = 0.0
    """Of making weights from what is stored, where that takes more than moving them."""
    loaded_bytes: float = 0.0
    """Of `disk_bytes`, weights that are loaded to stay, into memory that was not used before: while
    they are, nothing is computed.
    """
    past_bytes: float = 0.0
    """Of `disk_bytes`, KV of a step. A layer asks for it and waits; what it computes with one token
    beside the reading of later blocks is little.
    """

    def seconds(self, rates: Rates) -> dict[str, float]:
        """By what would limit the pass if the rest were free."""
        reading = sum(
            one.times * one.weights * seconds_per_weight(rates.products, min(one.rows, 1))
            for one in self.products
        )
        products = sum(
            one.times * one.weights * seconds_per_weight(rates.products, one.rows)
            for one in self.products
        )
        memory = self.memory_bytes / rates.memory.per_second
        own = self.layer_calls / rates.layer.per_second + self.numbers / rates.states.per_second
        blocks = rates.products
        if rates.blocks and not self.exact_attention:
            blocks = rates.blocks[min(rates.blocks, key=lambda size: abs(size - self.head_dim))]
        device = products + memory + own + self.converting_seconds
        device += self.attention / flop_rate(blocks, self.new_tokens)
        name = "memory" if reading + memory > device / 2 else "compute"
        if rates.bus is None:  # a GPU computes while the host loads and reads
            device += (self.loaded_bytes + self.past_bytes) / rates.disk.per_second
            device += self.loaded_bytes / rates.fresh.per_second
        found = {"disk": self.disk_bytes / rates.disk.per_second, name: device}
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
        self._num_layers = len(units.layers)
        self._layers, self._layer_outputs = _weights_and_outputs(units.layers)
        self._head, _ = _weights_and_outputs(units.head)
        self._stored = sum(unit.file_bytes for unit in units.in_pass_order)
        self._counts = [len(layer) for layer in units.experts.values()]
        one = next((layer[0] for layer in units.experts.values()), None)
        self._expert, self._expert_outputs = _weights_and_outputs([one] if one else [])
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
        num_chunks = scenario.batch * len(past)
        blocks = pairs / min(run.chunk_size, scenario.prompt_tokens) / _BLOCK_TOKENS
        return PassCost(
            disk_bytes=weights + kv * TIERS[run.kv_tier].in_files,
            bus_bytes=weights + kv * (run.kv_tier != "device"),
            memory_bytes=copies,
            products=self._products(num_tokens, num_chunks, scenario.batch, distinct),
            attention=self._attention(scenario.batch * pairs),
            new_tokens=min(run.chunk_size, scenario.prompt_tokens),
            head_dim=self._head_dim,
            exact_attention=run.attention == "exact",
            layer_calls=self._calls(num_chunks, distinct, scenario.batch * blocks),
            numbers=num_tokens * self._outputs
            + scenario.batch * pairs / _BLOCK_TOKENS * self._num_heads * self._head_dim,
            converting_seconds=self._seconds + distinct * self._expert_seconds,
            loaded_bytes=run.held.resident_bytes,
        )

    def token(self, run: DryRunResult, scenario: Scenario) -> PassCost:
        """A decode step at the end, for one new token of each sequence."""
        held, batch = run.held, scenario.batch
        distinct = self.distinct_experts(batch)
        every = max(self.num_experts, 1)
        on_device = held.num_device_experts / every
        kept = on_device + held.num_host_experts / every
        kv = batch * self._kv_bytes(scenario.context)
        kv_in_files = kv * TIERS[run.kv_tier].in_files
        read = held.streamed_bytes + distinct * (1 - kept) * self._expert_stored
        moved = distinct * (1 - on_device) * self._expert_stored
        seen = sum(self._span(kind, scenario.context) for kind in self._kinds)
        copies: float = _CONVERSION * held.converted_bytes
        if run.attention == "exact":
            copies += kv + batch * self._exact_bytes(scenario.context)
        return PassCost(
            disk_bytes=read + kv_in_files,
            bus_bytes=held.streamed_bytes
            + held.dense_host_bytes
            + moved
            + kv * (run.kv_tier != "device"),
            memory_bytes=copies,
            products=self._products(batch, 1, batch, distinct),
            attention=self._attention(batch * seen),
            new_tokens=1,
            head_dim=self._head_dim,
            exact_attention=run.attention == "exact",
            layer_calls=self._calls(1, distinct, batch * seen / _BLOCK_TOKENS),
            numbers=batch * self._outputs,
            converting_seconds=held.converting_seconds
            + distinct * (1 - on_device) * self._expert_seconds,
            past_bytes=kv_in_files,
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

    def _products(
        self, num_tokens: int, num_calls: int, num_logits: int, distinct: float
    ) -> list[Product]:
        """Of all layers, called so often, of the head, and of the experts that tokens choose."""
        found = [
            Product(self._layers, num_tokens / num_calls, num_calls),
            Product(self._head, num_logits),
        ]
        if distinct:
            rows = num_tokens * self._num_chosen * len(self._counts) / distinct
            found.append(Product(distinct * self._expert, max(rows, 1)))
        return found

    @property
    def _outputs(self) -> int:
        """Of all products of all layers, for one token."""
        chosen = len(self._counts) * self._num_chosen
        return self._layer_outputs + chosen * self._expert_outputs

    def _calls(self, num_calls: int, distinct: float, blocks: float) -> float:
        """As many calls of transformers' layer take as long as what is done for `num_calls` of all
        layers, `distinct` experts and so many blocks of a past.
        """
        engine = _ENGINE_CALL * self._num_layers * num_calls
        return engine + _EXPERT_CALL * distinct + _BLOCK_CALL * blocks

    @property
    def _head_dim(self) -> int:
        return max((kind.head_dim for kind in self._kinds), default=0)

    def _attention(self, pairs: float) -> float:
        return 4 * self._num_heads * self._head_dim * pairs

    @staticmethod
    def _seen(window: int | None, num_tokens: int) -> float:
        """Pairs of a query and a key of one layer."""
        span = min(window or num_tokens, num_tokens)
        return span * (span + 1) / 2 + (num_tokens - span) * span


def _weights_and_outputs(units: Iterable[WeightUnit]) -> tuple[int, int]:
    """How many weights are multiplied, and how many numbers one token makes of them."""
    shapes = [p.shape for unit in units for p in unit.parameters if len(p.shape) == 2]
    return sum(prod(shape) for shape in shapes), sum(shape[0] for shape in shapes)


def _experts_per_token(spec: ModelSpec) -> int:
    """How many the router chooses, asked without data."""
    meta = torch.device("meta")
    for mixture in spec.skeleton.mixtures.values():
        hidden = torch.empty(1, 1, spec.skeleton.config.hidden_size, dtype=spec.dtype, device=meta)
        with torch.no_grad():
            return mixture.route(hidden, ActivationOffload(meta, on_host=False)).tokens.numel()
    return 0
