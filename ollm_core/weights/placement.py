"""Placement: which weights are resident, in which memory, and how many bytes they take.

Nothing is allocated or read here: a run holds what this says, and a plan only asks.

A cyclic scan never finds in a cache what it needs next, so the resident set is fixed, not
least-recently-used. It follows one order that spreads any number of units evenly over the pass: the
reader always has something to do while resident layers compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from ollm_core.contracts.weights import ByteSource
from ollm_core.device.memory import DeviceMemory, memory_of
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.budgets import NO_LAYER_LIMITS, LayerLimits
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.pair import PerMemory, added
from ollm_core.weights.device_load import staging_bytes
from ollm_core.weights.experts.store import ExpertPlacement, ExpertStore
from ollm_core.weights.units import Units

HELD_KINDS = (
    MemoryKind.RESIDENT_WEIGHTS,
    MemoryKind.WEIGHT_RING,
    MemoryKind.UPLOAD_BUFFERS,
    MemoryKind.RESIDENT_EXPERTS,
    MemoryKind.EXPERT_BUFFERS,
)
"""What `fit` decides on."""

_UPLOADS = 2
_SLOTS = 3  # two suffice when disk and compute are even; the third takes up jitter


def spread_order(num_units: int) -> list[int]:
    """All unit indices, such that the first k of them lie evenly spread, for every k (bit-reversed
    counting).
    """
    bits = max((num_units - 1).bit_length(), 1)
    reversed_count = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [i for i in reversed_count if i < num_units]


@dataclass(frozen=True, slots=True)
class Placement:
    """Which units are kept on the device and in host memory. The rest is streamed through
    `num_slots` buffers, and to a device with memory of its own through `num_uploads` there.
    """

    device: frozenset[int] = frozenset()
    host: frozenset[int] = frozenset()
    num_slots: int = 0
    experts: ExpertPlacement = field(default_factory=ExpertPlacement)
    num_uploads: int = 1


class ResidentWeights:
    """The accounts of one model's weights: `place` says what is best held, `hold` reserves it."""

    def __init__(
        self,
        units: Units,
        source: ByteSource,
        dtype: torch.dtype,
        device: torch.device,
        accounts: Accounts,
        *,
        buffer_bytes: int = 0,
        memory: DeviceMemory | None = None,
        timed: bool = False,
    ) -> None:
        """See TieredStreamer; uploads of experts may be `timed`. Reserves nothing yet."""
        self.units = units.in_pass_order
        self.dtype = dtype
        self.device = device
        self.memory = memory = memory or memory_of(device)
        """The device's: whether it is the host's too, and all weights count as the device's."""
        self._device_account, self._host_account = accounts
        self._ring_account = memory.read_side(accounts)
        self._priority = spread_order(len(self.units))
        self.buffer_bytes = [source.buffer_bytes(unit.tensors) for unit in self.units]
        """Of each unit, as it is read."""
        packed = memory.is_own
        self.staging_bytes = staging_bytes((*self.units, units.norm), source) if packed else 0
        """Held on the host whatever the placement: what is kept on a device comes through it."""
        self.copied_bytes = [unit.copied_bytes(dtype, packed=packed) for unit in self.units]
        """Of each unit: new tensors that are made whenever it is streamed."""
        self.upload_bytes = max(unit.packed_bytes for unit in self.units) * packed
        """Of a buffer on a device with memory of its own: the largest unit, packed."""
        self._kept_bytes = [self._bytes_when_kept(i) for i in range(len(self.units))]
        self.experts = ExpertStore(
            units.experts, source, dtype, device, accounts, memory=memory, timed=timed
        )
        arrived = [unit.packed_bytes for unit in self.units] if packed else self.buffer_bytes
        sizes = zip(self.copied_bytes, arrived, strict=True)
        copied = max((max(pair) for pair in sizes if pair[0]), default=0)
        copied += max(unit.scratch_bytes for unit in (*self.units, units.norm))
        self.spare_bytes = [copied - own for own in self.copied_bytes]
        """Of what is there for parameters in conversion, by unit, what is free once its own are
        made.
        """
        norm_bytes = sum(p.num_bytes(dtype) for p in units.norm.parameters)
        self.fixed_device_bytes = (
            norm_bytes + buffer_bytes + copied + self.experts.fixed_device_bytes + self.upload_bytes
        )
        """Held on the device whatever the placement: norm, rotary frequencies, parameters in
        conversion, the one upload buffer that must be.
        """
        self._layer_limits: LayerLimits = NO_LAYER_LIMITS
        self._num_layers = len(units.layers)
        self._kept = Placement()  # of units: `experts` knows what is held of them
        self._fixed_held = self._staging_held = 0

    def limit_layers(self, limits: LayerLimits) -> None:
        """Let `place` keep no more layers from now on. Between passes."""
        self._layer_limits = limits

    @property
    def layer_limits(self) -> LayerLimits:
        """What `limit_layers` said last."""
        return self._layer_limits

    @property
    def placement(self) -> Placement:
        """What is held. Nobody else keeps account of it."""
        return replace(self._kept, experts=self.experts.placement)

    def is_on_device(self, unit_idx: int) -> bool:
        """Whether a unit is kept there, read or not."""
        return unit_idx in self._kept.device

    def is_on_host(self, unit_idx: int) -> bool:
        """The same of host memory."""
        return unit_idx in self._kept.host

    @property
    def slot_bytes(self) -> int:
        """Bytes of one buffer of the ring."""
        return max(self.buffer_bytes)

    @property
    def num_slots(self) -> int:
        """Buffers of the ring that are reserved."""
        return self._kept.num_slots

    @property
    def num_uploads(self) -> int:
        """Buffers on the device that units are sent to."""
        return self._kept.num_uploads

    @property
    def num_device_layers(self) -> int:
        """Layers that are kept on the device."""
        return sum(i < self._num_layers for i in self._kept.device)

    @property
    def num_host_layers(self) -> int:
        """Layers that are kept in host memory."""
        return sum(i < self._num_layers for i in self._kept.host)

    @property
    def num_device_units(self) -> int:
        """Units that are kept on the device."""
        return len(self._kept.device)

    @property
    def num_host_units(self) -> int:
        """Units that are kept in host memory."""
        return len(self._kept.host)

    @property
    def streamed(self) -> list[int]:
        """The units that are not kept, in pass order."""
        kept = self._kept.device | self._kept.host
        return [i for i in range(len(self.units)) if i not in kept]

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters that are kept between passes, in the compute dtype."""
        kept = self._kept.device | self._kept.host
        dense = sum(p.num_bytes(self.dtype) for i in kept for p in self.units[i].parameters)
        return dense + self.experts.resident_bytes

    def least_bytes(self, device_bytes: int) -> int:
        """The least that `fit` needs of the ring's memory, given `device_bytes` of the device."""
        experts = self.experts.least_bytes
        device_bytes -= self.memory.reads(experts).device
        if self._all_fit(device_bytes):
            return experts
        ring_bytes = 2 * self.slot_bytes
        if not self.memory.is_own and self._may_all_be_kept:  # two units at most can take less
            ring_bytes = min(ring_bytes, sum(self._kept_bytes))
        return ring_bytes + experts

    def reserve(self) -> None:
        """Take `fixed_device_bytes` and `staging_bytes`. Raises DoesNotFitError with nothing
        taken.
        """
        self._device_account.reserve(MemoryKind.WEIGHTS, self.fixed_device_bytes)
        self._fixed_held = self.fixed_device_bytes
        try:
            self._host_account.reserve(MemoryKind.WEIGHT_STAGING, self.staging_bytes)
        except BaseException:
            self.unreserve()
            raise
        self._staging_held = self.staging_bytes

    def fit(self, device_bytes: int, host_bytes: int) -> None:
        """Hold at most that much beside `fixed_device_bytes`. Raises DoesNotFitError."""
        self.hold(self.place(device_bytes, host_bytes))

    def place(self, device_bytes: int, host_bytes: int) -> Placement:
        """What is best held in that much memory. Experts get what the rest leaves."""
        least = self.memory.reads(self.experts.least_bytes)
        dense = self._place(device_bytes - least.device, host_bytes - least.host)
        held = self.bytes_of(dense)
        experts = self.experts.place(device_bytes - held.device, host_bytes - held.host)
        return Placement(dense.device, dense.host, dense.num_slots, experts, dense.num_uploads)

    def bytes_of(self, placement: Placement) -> PerMemory[int]:
        """What a placement takes of each memory, beside `fixed_device_bytes`."""
        experts = placement.experts
        device = sum(self._kept_bytes[i] for i in placement.device) + experts.device_bytes
        device += self._more_uploads(placement.num_uploads) + experts.upload_bytes
        host = sum(self.buffer_bytes[i] for i in placement.host) + experts.host_bytes
        ring = placement.num_slots * self.slot_bytes + experts.buffer_bytes
        return added(PerMemory(device, host), self.memory.reads(ring))

    def hold(self, wanted: Placement) -> None:
        """Give back what is not in `wanted`, then take what is. Raises DoesNotFitError with part of
        it taken.
        """
        device, host, kept = self._device_account, self._host_account, self._kept
        self.experts.shrink(wanted.experts)
        for i in kept.device - wanted.device:
            device.release(MemoryKind.RESIDENT_WEIGHTS, self._kept_bytes[i])
        for i in kept.host - wanted.host:
            host.release(MemoryKind.RESIDENT_WEIGHTS, self.buffer_bytes[i])
        self._kept = replace(kept, device=kept.device & wanted.device, host=kept.host & wanted.host)
        if wanted.num_slots != kept.num_slots:
            ring, slot_bytes = self._ring_account, self.slot_bytes
            ring.release(MemoryKind.WEIGHT_RING, kept.num_slots * slot_bytes)
            self._kept = replace(self._kept, num_slots=0)
            ring.reserve(MemoryKind.WEIGHT_RING, wanted.num_slots * slot_bytes)
            self._kept = replace(self._kept, num_slots=wanted.num_slots)
        if wanted.num_uploads != kept.num_uploads:
            more = self._more_uploads(wanted.num_uploads) - self._more_uploads(kept.num_uploads)
            if more > 0:
                device.reserve(MemoryKind.UPLOAD_BUFFERS, more)
            else:
                device.release(MemoryKind.UPLOAD_BUFFERS, -more)
            self._kept = replace(self._kept, num_uploads=wanted.num_uploads)
        for i in wanted.device - self._kept.device:
            device.reserve(MemoryKind.RESIDENT_WEIGHTS, self._kept_bytes[i])
            self._kept = replace(self._kept, device=self._kept.device | {i})
        for i in wanted.host - self._kept.host:
            host.reserve(MemoryKind.RESIDENT_WEIGHTS, self.buffer_bytes[i])
            self._kept = replace(self._kept, host=self._kept.host | {i})
        self.experts.grow(wanted.experts)

    def close(self) -> None:
        """Give back everything, and free the experts."""
        self.experts.close()
        self.hold(Placement())
        self.unreserve()

    def unreserve(self) -> None:
        """Give back what `reserve` took."""
        self._device_account.release(MemoryKind.WEIGHTS, self._fixed_held)
        self._host_account.release(MemoryKind.WEIGHT_STAGING, self._staging_held)
        self._fixed_held = self._staging_held = 0

    def _place(self, device_bytes: int, host_bytes: int) -> Placement:
        everything = frozenset(range(len(self.units)))
        if self._all_fit(device_bytes):
            return Placement(everything)
        # The second buffer makes the copy of a layer run beside the compute of another.
        twice = self.memory.is_own and device_bytes >= self.upload_bytes
        num_uploads = _UPLOADS if twice else 1
        device_bytes -= self._more_uploads(num_uploads)
        ring_budget = self.memory.read_side(PerMemory(device_bytes, host_bytes))
        num_slots = _SLOTS if ring_budget >= 2 * _SLOTS * self.slot_bytes else 2
        ring = self.memory.reads(num_slots * self.slot_bytes)
        device = _first_that_fit(
            device_bytes - ring.device,
            self._kept_bytes,
            self._allowed(self._layer_limits.device, self._priority),
        )
        if not self.memory.is_own:
            return Placement(device, num_slots=num_slots)
        rest = self._allowed(
            self._layer_limits.host, [i for i in self._priority if i not in device]
        )
        host = _first_that_fit(host_bytes - ring.host, self.buffer_bytes, rest)
        return Placement(device, host, num_slots, num_uploads=num_uploads)

    def _more_uploads(self, num_uploads: int) -> int:
        """Bytes of the upload buffers that need not be."""
        return (num_uploads - 1) * self.upload_bytes

    def _all_fit(self, device_bytes: int) -> bool:
        """Whether all units can be kept on the device."""
        return self._may_all_be_kept and sum(self._kept_bytes) <= device_bytes

    @property
    def _may_all_be_kept(self) -> bool:
        most = self._layer_limits.device
        return most is None or most >= self._num_layers

    def _allowed(self, most: int | None, priority: Sequence[int]) -> list[int]:
        """Of the units in `priority`, at most so many layers."""
        layers = [i for i in priority if i < self._num_layers][:most]
        return [i for i in priority if i >= self._num_layers or i in layers]

    def _bytes_when_kept(self, unit_idx: int) -> int:
        unit = self.units[unit_idx]
        if self.copied_bytes[unit_idx] == 0:  # all are views of the buffer
            return unit.packed_bytes if self.memory.is_own else self.buffer_bytes[unit_idx]
        return sum(p.num_bytes(self.dtype) for p in unit.parameters)


def _first_that_fit(budget: int, sizes: Sequence[int], priority: Sequence[int]) -> frozenset[int]:
    used = accumulate(sizes[i] for i in priority)
    return frozenset(i for i, total in zip(priority, used, strict=True) if total <= budget)
