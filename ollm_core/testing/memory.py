"""What a run is planned to hold, and what it holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from ollm_core.contracts.adapter import ModelAdapter
from ollm_core.device.offload import host_like
from ollm_core.memory.budgets import Budgets
from ollm_core.memory.tracker import AllocationTracker
from ollm_core.model.spec import ModelSpec
from ollm_core.planning.dry_run import DryRun, Scenario
from ollm_core.plugins.registry import Registry
from ollm_core.testing.declarations import spec_of

_STORES = "ollm_core.kv."
_DEPTH = 13
"""Frames between an allocation and what asked for it."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run as a plan tells it, in bytes."""

    device_memory: int
    """The limits that the run is given."""
    host_memory: int
    device_peak: int
    """The most that it will hold."""
    host_peak: int


def open_dry_run(
    adapter: ModelAdapter,
    directory: Path,
    registry: Registry,
    dtype: str = "auto",
    make: Callable[[ModelSpec], DryRun] = DryRun,
) -> DryRun:
    """What plans runs of the model in `directory` on a CPU, by the code of `ollm plan`. Nothing is
    allocated and only headers are read. `make` is for testing a test: a subclass that plans wrong.
    """
    return make(spec_of(adapter, directory, registry, dtype))


def plan_run(
    dry_run: DryRun,
    *,
    num_tokens: int,
    num_new: int,
    kv: str,
    chunk_size: int | None,
    roomy: bool,
) -> PlannedRun:
    """Plan a run of one sequence of `num_tokens`, the last `num_new` of them generated, with exact
    attention: in the least memory that it takes or, `roomy`, with half of the checkpoint more on
    the device and twice as much on the host.
    """
    scenario = Scenario(num_tokens, num_new, 1, kv, "exact", chunk_size)
    budgets = dry_run.least(scenario, Budgets(1, 1))
    if roomy:
        more = dry_run.spec.checkpoint.total_bytes // 2
        budgets = Budgets(budgets.device + more, 2 * budgets.host)
    found = dry_run.run(budgets, scenario)
    return PlannedRun(
        budgets.device,
        budgets.host,
        found.device_peak.device_bytes,
        found.host_peak.host_bytes,
    )


class TierTracker(AllocationTracker):
    """Counts what is allocated on a CPU inside the `with` block, whatever the accounts say: of the
    device, and apart from it of the host, which on a CPU differ only in what the memory is for.

    `used` and `peak` are the device's, `host_used` and `host_peak` the host's: that is what KV
    stores allocate, if KV is not on the device, and hidden states that are offloaded there. What is
    not made by a torch operation, as pages for O_DIRECT, is not seen.
    """

    def __init__(self, *, kv_on_device: bool) -> None:
        super().__init__("cpu")
        self.host_used = 0
        self.host_peak = 0
        self._kv_on_device = kv_on_device
        self._on_host: set[int] = set()

    def _count(self, storage: torch.UntypedStorage, *, made_here: bool = True) -> None:
        peak, used = self.peak, self.used
        super()._count(storage, made_here=made_here)
        if self.used > used and self._is_for_host():
            self._on_host.add(storage._cdata)
            self.host_used += self.used - used
            self.host_peak = max(self.host_peak, self.host_used)
            self.peak, self.used = peak, used

    def _forget(self, key: int, num_bytes: int) -> None:
        super()._forget(key, num_bytes)
        if key in self._on_host:
            self._on_host.remove(key)
            self.host_used -= num_bytes
            self.used += num_bytes

    def _is_for_host(self) -> bool:
        """Who asked for the allocation that is being counted."""
        frame: FrameType | None = sys._getframe(2)
        for _ in range(_DEPTH):
            if frame is None:
                return False
            if frame.f_code is host_like.__code__:
                return True
            if str(frame.f_globals.get("__name__", "")).startswith(_STORES):
                return not self._kv_on_device
            frame = frame.f_back
        return False
