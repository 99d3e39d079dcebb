"""A dry run: the pass planner, placement and accounts of a real run, without data, so that plan and
run cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ollm_core.engine.activations import Workspace
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.pass_planner import PassPlan, PassPlanner, Policy
from ollm_core.errors import DoesNotFitError
from ollm_core.kv.factory import choose_tier
from ollm_core.kv.simulated import SimulatedHybridStore, SimulatedKVStore, simulated_store
from ollm_core.kv.tiers import TIERS, check_tier
from ollm_core.memory.accounts import open_accounts
from ollm_core.memory.budgets import NO_LAYER_LIMITS, Budgets, LayerLimits
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.pair import PerMemory
from ollm_core.model.spec import ModelSpec
from ollm_core.plugins.registry import require, supports
from ollm_core.weights.placement import Placement, ResidentWeights
from ollm_core.weights.sources.page_aligned import DescribedSource

EVERY_STEP = 256
"""New tokens up to which each decode step is gone through where attention may be exact. Otherwise
those are that begin a block of KV, and those before.
"""

_MAX_TRIES = 16
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is run: `batch` prompts of equal length, that grow to `context` tokens each by
    `new_tokens`.
    """

    context: int
    new_tokens: int
    batch: int = 1
    kv: str = "auto"
    attention: str = "auto"
    chunk_size: int | None = None
    layers: LayerLimits = NO_LAYER_LIMITS

    @property
    def prompt_tokens(self) -> int:
        """Tokens of each prompt."""
        return self.context - self.new_tokens


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held inside one pass, by kind; all parts add up."""

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    disk_bytes: int
    num_tokens: int
    """Of each sequence, stored before the pass."""

    @property
    def device_bytes(self) -> int:
        """All of the device's memory."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All of the host's memory."""
        return sum(self.host.values())


@dataclass(frozen=True, slots=True)
class Held:
    """The weights as they lie during a decode step."""

    num_units: int
    num_device_units: int
    num_host_units: int
    num_device_layers: int
    """Of these units."""
    num_host_layers: int
    num_slots: int
    slot_bytes: int
    streamed_bytes: int
    """Of whole units, read from disk in each pass."""
    converted_bytes: int
    """Of those units, parameters that are made anew in each pass, as for another dtype."""
    converting_seconds: float
    """About how long that takes beside moving the bytes, where somebody says so."""
    resident_bytes: int
    """Of parameters that are kept in either memory, in the compute dtype."""
    dense_host_bytes: int
    """Of units that are kept on the host."""
    num_device_experts: int
    num_host_experts: int


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """How a run went."""

    kv_tier: str
    chunk_size: int
    """Of the prompt."""
    num_chunks: int
    attention: str
    hidden_on_host: bool
    held: Held
    moments: Sequence[Moment]
    """The model just opened, the prompt, and decode steps, in order."""

    @property
    def device_peak(self) -> Moment:
        """When the device holds most."""
        return max(self.moments, key=lambda moment: moment.device_bytes)

    @property
    def host_peak(self) -> Moment:
        """When the host holds most."""
        return max(self.moments, key=lambda moment: moment.host_bytes)

    @property
    def disk_bytes(self) -> int:
        """The most that KV takes on disk."""
        return max(moment.disk_bytes for moment in self.moments)


class DryRun:
    """One model, to be run on paper as often as wanted. What layers take is traced once."""

    def __init__(self, spec: ModelSpec, blocks: str = "blockwise") -> None:
        """`spec` may be bare; nothing is allocated on its device. `blocks` is what attention "auto"
        takes where it is not exact.
        """
        self.spec = spec
        self._blocks = blocks
        self._accounts = open_accounts(PerMemory(_NO_LIMIT, _NO_LIMIT))
        self._weights = ResidentWeights(
            spec.units,
            DescribedSource(),
            spec.dtype,
            spec.device,
            self._accounts,
            buffer_bytes=spec.skeleton.buffer_bytes,
            memory=spec.memory,
        )
        self._workspace = Workspace.of(spec)

    @property
    def takes_prompts_whole(self) -> bool:
        """Whether a prompt must be one chunk: its layers may then walk from token to token."""
        return self._workspace.steps == "all"

    def run(self, budgets: Budgets, scenario: Scenario, *, ends_only: bool = False) -> DryRunResult:
        """Go through a run. With `ends_only`, of the decode steps only the last.

        Raises DoesNotFitError as the run would, UnsupportedError for what the family cannot do.
        """
        self._accounts.device.limit, self._accounts.host.limit = budgets.device, budgets.host
        with ExitStack() as stack:
            stack.callback(self._weights.hold, Placement())
            return self._run(scenario, stack, ends_only=ends_only)

    def least(self, scenario: Scenario, budgets: Budgets) -> Budgets:
        """The smallest budgets, each at least as `budgets` says, with which the run would do."""
        device, host = budgets.device, budgets.host
        for _ in range(_MAX_TRIES):
            try:
                self.run(PerMemory(device, host), scenario, ends_only=True)
            except DoesNotFitError as refused:
                if refused.memory == self._accounts.host.name:
                    host = max(refused.needed_bytes, host + 1)
                else:
                    device = max(refused.needed_bytes, device + 1)
            else:
                break
        return PerMemory(device, host)

    def fits(self, scenario: Scenario, budgets: Budgets) -> bool:
        """Whether the run would do."""
        try:
            self.run(budgets, scenario, ends_only=True)
        except DoesNotFitError:
            return False
        return True

    def _run(self, scenario: Scenario, stack: ExitStack, *, ends_only: bool) -> DryRunResult:
        spec = self.spec
        if scenario.batch > 1:
            require(spec.adapter, "batch")
        policy = Policy.of(spec, scenario.attention, scenario.chunk_size, self._blocks)
        pass_planner = PassPlanner(policy, self._accounts, self._weights, self._workspace)
        self._weights.limit_layers(scenario.layers)
        self._weights.reserve()
        stack.callback(self._weights.unreserve)
        tier = self._tier(scenario)
        store = simulated_store(tier, spec.geometry, self._accounts, spec.memory)
        stack.callback(store.close)
        sequences = [store.new_sequence() for _ in range(scenario.batch)]
        moments = [self._moment("opened", store, None, 0)]
        length = 0

        def grow(num_tokens: int, longest: int) -> None:
            nonlocal length
            length += num_tokens
            for sequence in sequences:
                store.advance(sequence, num_tokens, longest)
                store.commit(sequence)

        prompt = torch.empty(scenario.prompt_tokens, dtype=torch.int64, device="meta")
        work = [NewTokens(sequence, prompt, 0) for sequence in sequences]
        with pass_planner.admit(store, work) as first:
            moments.append(self._moment("prompt", store, first, 0))
            held = self._held()
        grow(scenario.prompt_tokens, first.chunk_size)
        for step in self._steps(scenario, ends_only=ends_only):
            work = [NewTokens(sequence, prompt[:1], step) for sequence in sequences]
            if ends_only:
                self._weights.hold(Placement())  # as the steps between would make room
                pass_planner.choose(store, work)  # a refusal names all that the steps would take
            while length < step:
                grow(min(step - length, store.block_size), store.block_size)
            with pass_planner.admit(store, work) as plan:
                moments.append(self._moment(f"token {step + 1}", store, plan, step))
                held = self._held()
            grow(1, 1)
        return DryRunResult(
            tier,
            first.chunk_size,
            len(first.chunks),
            first.attention,
            first.hidden_on_host,
            held,
            moments,
        )

    def _tier(self, scenario: Scenario) -> str:
        tier = scenario.kv
        if tier == "auto":
            limits = self._accounts.map(lambda account: account.limit)
            num_tokens = scenario.batch * scenario.context
            tier = choose_tier(self.spec.adapter, self.spec.geometry, limits, num_tokens)
        if tier in TIERS:
            check_tier(self.spec.adapter, tier)
        return tier

    def _steps(self, scenario: Scenario, *, ends_only: bool) -> Sequence[int]:
        """Tokens before each decode step that is looked at. The prompt gives the first new one."""
        first, end = scenario.prompt_tokens, scenario.context - 1
        if first >= end:
            return ()
        if ends_only:
            return (end - 1,)
        may_use_blocks = supports(self.spec.adapter, "blockwise-attention")
        exact = scenario.attention == "exact" or not may_use_blocks
        if exact and scenario.new_tokens <= EVERY_STEP:
            return range(first, end)  # what a step takes grows with each token
        block_size = self.spec.geometry.block_size
        blocks = range(-(-first // block_size) * block_size, end, block_size)
        around = {step for block in blocks for step in (block - 1, block)}
        return sorted({first, end - 1} | {step for step in around if first <= step < end})

    def _moment(
        self,
        name: str,
        store: SimulatedKVStore | SimulatedHybridStore,
        plan: PassPlan | None,
        num_tokens: int,
    ) -> Moment:
        kinds = self._accounts.map(lambda account: dict(account.kinds))
        for held, needed in zip(kinds, plan.parts if plan else ({}, {}), strict=True):
            held.pop(MemoryKind.ACTIVATIONS, None)
            held.update(needed)
        device, host = ({k: n for k, n in held.items() if n} for held in kinds)
        return Moment(name, device, host, store.tier_bytes().disk, num_tokens)

    def _held(self) -> Held:
        weights = self._weights
        return Held(
            len(weights.units),
            weights.num_device_units,
            weights.num_host_units,
            weights.num_device_layers,
            weights.num_host_layers,
            weights.num_slots,
            weights.slot_bytes,
            sum(weights.buffer_bytes[i] for i in weights.streamed),
            sum(weights.copied_bytes[i] for i in weights.streamed),
            sum(weights.units[i].seconds for i in weights.streamed),
            weights.resident_bytes,
            self._accounts.host.kinds.get(MemoryKind.RESIDENT_WEIGHTS, 0),
            weights.experts.placement.num_device,
            weights.experts.placement.num_host,
        )
