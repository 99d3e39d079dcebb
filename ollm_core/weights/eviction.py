"""Evicts weights when other programs take the machine's memory, and loads them again when there is
room. Tokens stay the same; more is read.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ollm_core.memory.budgets import RESERVE_BYTES, Budgets
from ollm_core.memory.pair import PerMemory
from ollm_core.memory.sizes import format_size
from ollm_core.weights.streamer import TieredStreamer

logger = logging.getLogger("ollm")

LOOK_SECONDS = 1.0
"""Between two looks at what is free while a pass runs."""
GLANCE_SECONDS = 0.25
"""Between two looks before passes that take no more than a sixteenth of the reserve beyond what was
looked at, while nothing is short: a look costs as much as a layer of a small model.
"""
_PATIENCE = 8
"""Passes after a failed allocation until more may be kept: what is free is then not all there is
to know.
"""


def reserve_bytes(total: int) -> int:
    """What is to stay free of a machine or a container of `total` bytes: a sixteenth of a small
    one, `RESERVE_BYTES` of any other.
    """
    return min(RESERVE_BYTES, total // 16)


@dataclass(slots=True)
class Shortage:
    """How often weights gave way, and how many bytes of them are not kept for it."""

    times: int = 0
    now_bytes: int = 0
    most_bytes: int = 0


class _Level:
    """How much of one memory the kept weights may take: all of it, until that runs short."""

    def __init__(
        self, name: str, free: Callable[[], int], reserve_bytes: int, shortage: Shortage
    ) -> None:
        self._name = name
        self._reserve_bytes = reserve_bytes
        self._free = free
        self._shortage = shortage
        self._ceiling: int | None = None
        self._patience = 0

    def allowed(self, budget: int, wanted: int, held: int, others: int) -> int:
        """Bytes of `budget` that weights may hold, who would hold `wanted` of it and have `held` in
        memory, while a pass takes `others` beside them.
        """
        room = self._free() + held - others
        before = wanted if self._ceiling is None else min(self._ceiling, wanted)
        now = max(room - self._reserve_bytes, 0)
        if room - self._reserve_bytes // 2 < before and now < before:
            self._shortage.times += 1
            logger.warning(
                "%s runs short: %s of weights stay resident, not %s",
                self._name,
                format_size(now),
                format_size(before),
            )
            self._ceiling = now
        elif self._patience:
            self._patience -= 1
        elif self._ceiling is not None:
            self._ceiling = max(self._ceiling, now)
            if self._ceiling >= wanted:
                self._ceiling = None
        if self._ceiling is None:
            return budget
        missing = max(wanted - self._ceiling, 0)
        self._shortage.now_bytes += missing
        return min(budget, self._ceiling)

    def is_short(self) -> bool:
        """Whether less is free now, in the middle of a pass, than may be."""
        return self._free() < self._reserve_bytes // 2

    def empty(self) -> None:
        """Let weights hold nothing that they need not, for a while."""
        self._ceiling, self._patience = 0, _PATIENCE


class Eviction:
    """Asked once before each pass, and now and then in a long one. What goes first is what costs
    least: kept experts, of which a pass wants few, then whole layers.
    """

    def __init__(
        self,
        weights: TieredStreamer,
        free_host: Callable[[], int],
        free_device: Callable[[], int] | None = None,
        *,
        reserve_bytes: int = RESERVE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`free_host` and, for a device with a memory of its own, `free_device` tell the bytes that
        can be allocated there now.

        Weights give way where a pass would leave less than half of `reserve_bytes` free, and then
        until all of it is; they come back where all of it stays free.
        """
        self.shortage = Shortage()
        self._weights = weights
        self._clock = clock
        self._looked = clock()
        self._enough = -math.inf
        self._glance_bytes = reserve_bytes // 16
        self._host = _Level("host memory", free_host, reserve_bytes, self.shortage)
        self._device = free_device and _Level(
            "device memory", free_device, reserve_bytes, self.shortage
        )

    def within(self, budgets: Budgets, needed: PerMemory[int]) -> Budgets:
        """The part of `budgets` that weights may hold while a pass takes `needed` beside them,
        never less than they must.
        """
        device, host = budgets
        weights, shortage = self._weights, self.shortage
        now, taken = self._clock(), sum(needed)
        if now - self._looked < GLANCE_SECONDS and taken <= self._enough:
            return budgets
        self._looked = now
        wanted, held = weights.wanted_bytes(budgets), weights.in_memory
        shortage.now_bytes = 0
        if not weights.memory.is_own:
            allowed = self._host.allowed(device, wanted.device, held.device, taken)
            device = min(max(allowed, weights.least_bytes(allowed)), device)
        else:
            if self._device is not None:
                device = self._device.allowed(device, wanted.device, held.device, needed.device)
            allowed = self._host.allowed(host, wanted.host, held.host, needed.host)
            host = min(max(allowed, weights.least_bytes(device)), host)
        shortage.most_bytes = max(shortage.most_bytes, shortage.now_bytes)
        self._enough = -math.inf if shortage.now_bytes else taken + self._glance_bytes
        return PerMemory(device, host)

    def relieve(self, num_done: int) -> None:
        """In a pass that is through with `num_done` units: where memory has run short since the
        last look, free kept experts and what is kept of those units. They are read again when they
        are wanted; the next pass finds out what may be kept.
        """
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._enough = -math.inf  # the next pass looks for itself
        own_memory, freed = self._weights.memory.is_own, 0
        if self._host.is_short():
            freed += self._weights.let_go(num_done, host=own_memory)
        if self._device is not None and self._device.is_short():
            freed += self._weights.let_go(num_done, host=False)
        if freed:
            shortage = self.shortage
            shortage.times += 1
            shortage.now_bytes += freed
            shortage.most_bytes = max(shortage.most_bytes, shortage.now_bytes)
            logger.warning("memory runs short in a pass: %s of weights evicted", format_size(freed))

    def give_way(self) -> None:
        """An allocation failed: keep as little as can be in the next passes."""
        self.shortage.times += 1
        self._enough = -math.inf
        for level in (self._device, self._host):
            if level is not None:
                level.empty()
