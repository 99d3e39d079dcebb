"""The weights of one model over the tiers: some units resident, the rest streamed from disk, inside
a budget.

A cyclic scan never finds in a cache what it needs next, so the resident set is fixed, not
least-recently-used. It follows one order that spreads any number of units evenly over the pass: the
reader always has something to do while resident layers compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ollm_core.buffers import aligned_buffer, as_memoryview
from ollm_core.interfaces import ByteSource, WeightStreamer
from ollm_core.memory import MemoryAccount
from ollm_core.weights.experts import ExpertCounters, ExpertStore
from ollm_core.weights.ring import Ring
from ollm_core.weights.rows import EmbeddingRows
from ollm_core.weights.units import Units, WeightUnit
from ollm_core.weights.upload import Upload

HELD_KINDS = ("resident weights", "weight ring", "resident experts", "expert buffers")
"""What `fit` decides on, as the accounts name it."""

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
    `num_slots` buffers.
    """

    device: frozenset[int]
    host: frozenset[int]
    num_slots: int


class TieredWeights(WeightStreamer):
    """Gives out the units of a model. `fit` says how much memory it may hold; it may be called
    between passes.
    """

    def __init__(
        self,
        units: Units,
        source: ByteSource,
        dtype: torch.dtype,
        device: torch.device,
        accounts: tuple[MemoryAccount, MemoryAccount],
        *,
        buffer_bytes: int = 0,
    ) -> None:
        """`accounts` are those of the device and the host. On a CPU everything counts as device
        memory. `buffer_bytes` are those of the model that are no weights, and held for it.
        `source` is closed with the weights, and when they cannot be opened.
        """
        self.units = units.in_pass_order
        self.expert_units = units.experts
        self.dtype = dtype
        self.device = device
        self._device_account, self._host_account = accounts
        self._source = source
        self._rows = EmbeddingRows(units.embedding)
        self._priority = spread_order(len(self.units))
        self._buffer_bytes = [source.buffer_bytes(unit.tensors) for unit in self.units]
        self._copied_bytes = [unit.copied_bytes(dtype) for unit in self.units]
        self._kept_bytes = [self._bytes_when_kept(i) for i in range(len(self.units))]
        self._device_units: dict[int, list[Tensor] | None] = {}
        self._host_units: dict[int, tuple[Tensor, Sequence[int]] | None] = {}
        self._ring: Ring | None = None
        self._ring_account = self._device_account if device.type == "cpu" else self._host_account
        self._streamed_bytes = 0
        self._read_seconds = 0.0
        sizes = zip(self._copied_bytes, self._buffer_bytes, strict=True)
        copied = max((max(pair) for pair in sizes if pair[0]), default=0)
        copied += max(unit.scratch_bytes for unit in (*self.units, units.norm))
        norm_bytes = sum(p.num_bytes(dtype) for p in units.norm.parameters)
        self._upload = None if device.type == "cpu" else Upload(device, max(self._buffer_bytes))
        self._experts = ExpertStore(units.experts, source, dtype, device, accounts)
        self.fixed_device_bytes = (
            norm_bytes
            + buffer_bytes
            + copied
            + self._experts.fixed_device_bytes
            + (0 if self._upload is None else self._upload.num_bytes)
        )
        """Held on the device whatever the placement: norm, rotary frequencies, parameters in
        conversion, the upload buffer.
        """
        self._fixed_held = 0
        self.norm: list[Tensor] = []
        try:
            self._device_account.reserve("weights", self.fixed_device_bytes)
            self._fixed_held = self.fixed_device_bytes
            # Copies: a view would keep the whole page that was read.
            self.norm = [parameter.clone() for parameter in self._load(units.norm)]
        except BaseException:
            self.close()
            raise

    @property
    def slot_bytes(self) -> int:
        """Bytes of one buffer of the ring."""
        return max(self._buffer_bytes)

    def least_bytes(self, device_bytes: int) -> int:
        """The least that `fit` needs of the ring's memory, given `device_bytes` of the device."""
        experts = self._experts.least_bytes
        if self.device.type == "cpu":
            device_bytes -= experts
        dense = 0 if sum(self._kept_bytes) <= device_bytes else 2 * self.slot_bytes
        return dense + experts

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters that are kept between passes, in the compute dtype."""
        kept = self._device_units.keys() | self._host_units.keys()
        dense = sum(p.num_bytes(self.dtype) for i in kept for p in self.units[i].parameters)
        return dense + self._experts.resident_bytes

    @property
    def expert_counters(self) -> ExpertCounters:
        """What was done for routed experts so far."""
        return self._experts.counters

    @property
    def bytes_read(self) -> int:
        """Streamed from storage so far; loading what stays resident is not counted."""
        streamed = self._streamed_bytes + (self._ring.bytes_read if self._ring else 0)
        experts = self._experts.counters
        return streamed + experts.bytes_read - experts.kept_bytes

    @property
    def read_seconds(self) -> float:
        """Time the reading engine spent on `bytes_read`."""
        streaming = self._read_seconds + (self._ring.read_seconds if self._ring else 0.0)
        return streaming + self._experts.counters.read_seconds

    @property
    def reader(self) -> str:
        """The name of the reading engine."""
        return self._source.name

    def fit(self, device_bytes: int, host_bytes: int) -> None:
        """Hold at most `device_bytes` and `host_bytes` beside `fixed_device_bytes`, as much as is
        useful of it.

        Drops resident units or plans more of them; those are read when they are first acquired.
        Experts get what the rest leaves. Raises DoesNotFitError if not even the ring fits.
        """
        on_cpu, least = self.device.type == "cpu", self._experts.least_bytes
        wanted = self._place(device_bytes - least * on_cpu, host_bytes - least * (not on_cpu))
        ring_bytes = wanted.num_slots * self.slot_bytes
        on_device = sum(self._kept_bytes[i] for i in wanted.device) + ring_bytes * on_cpu
        on_host = sum(self._buffer_bytes[i] for i in wanted.host) + ring_bytes * (not on_cpu)
        experts = self._experts.place(device_bytes - on_device, host_bytes - on_host)
        self._experts.shrink(experts)
        for i in self._device_units.keys() - wanted.device:
            del self._device_units[i]
            self._device_account.release("resident weights", self._kept_bytes[i])
        for i in self._host_units.keys() - wanted.host:
            del self._host_units[i]
            self._host_account.release("resident weights", self._buffer_bytes[i])
        self._resize_ring(wanted.num_slots)
        for i in wanted.device - self._device_units.keys():
            self._device_account.reserve("resident weights", self._kept_bytes[i])
            self._device_units[i] = None
        for i in wanted.host - self._host_units.keys():
            self._host_account.reserve("resident weights", self._buffer_bytes[i])
            self._host_units[i] = None
        if self._ring:
            kept = self._device_units.keys() | self._host_units.keys()
            self._ring.set_order([i for i in range(len(self.units)) if i not in kept])
        self._experts.grow(experts)

    @contextmanager
    def acquire(self, unit_idx: int) -> Iterator[Sequence[Tensor]]:
        """See WeightStreamer. `unit_idx` counts in pass order: layers first, then the parts of the
        head.
        """
        unit = self.units[unit_idx]
        if unit_idx in self._device_units:
            resident = self._device_units[unit_idx]
            if resident is None:
                resident = self._device_units[unit_idx] = self._load(unit)
            yield resident
        elif unit_idx in self._host_units:
            kept = self._host_units[unit_idx]
            if kept is None:
                kept = self._host_units[unit_idx] = self._read(unit)
            yield unit.build(self._uploaded(kept[0]), kept[1], self.dtype)
        else:
            assert self._ring is not None, "fit() makes the ring before anything is streamed"
            slot = self._ring.take(unit_idx)
            try:
                if self._upload is not None:
                    yield unit.build(self._uploaded(slot.buffer), slot.offsets, self.dtype)
                elif self._copied_bytes[unit_idx]:
                    yield unit.build(slot.buffer, slot.offsets, self.dtype)
                else:
                    if unit_idx not in slot.built:
                        slot.built[unit_idx] = unit.build(slot.buffer, slot.offsets, self.dtype)
                    yield slot.built[unit_idx]
            finally:
                if self._upload is not None:
                    self._upload.wait()
                self._ring.give_back(slot)

    def experts(
        self, layer_idx: int, expert_ids: Iterable[int]
    ) -> AbstractContextManager[Iterator[tuple[int, Sequence[Tensor]]]]:
        """See WeightStreamer."""
        return self._experts.experts(layer_idx, expert_ids)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Rows of the input embedding, [N] -> [N, C], in the compute dtype on the device."""
        return self._rows.lookup(token_ids.cpu(), self.dtype).to(self.device)

    def close(self) -> None:
        """Stop the reader, close the files, free all weights and what was reserved for them."""
        self._resize_ring(0)
        self._experts.close()
        self._rows.close()
        self._source.close()
        for i in self._device_units:
            self._device_account.release("resident weights", self._kept_bytes[i])
        for i in self._host_units:
            self._host_account.release("resident weights", self._buffer_bytes[i])
        self._device_account.release("weights", self._fixed_held)
        self._fixed_held = 0
        self._device_units.clear()
        self._host_units.clear()
        self.norm = []
        self._upload = None

    def _place(self, device_bytes: int, host_bytes: int) -> Placement:
        everything = frozenset(range(len(self.units)))
        if sum(self._kept_bytes) <= device_bytes:
            return Placement(everything, frozenset(), 0)
        on_cpu = self.device.type == "cpu"
        ring_budget = device_bytes if on_cpu else host_bytes
        num_slots = _SLOTS if ring_budget >= 2 * _SLOTS * self.slot_bytes else 2
        ring_bytes = num_slots * self.slot_bytes
        device = _first_that_fit(
            device_bytes - ring_bytes if on_cpu else device_bytes, self._kept_bytes, self._priority
        )
        if on_cpu:
            return Placement(device, frozenset(), num_slots)
        rest = [i for i in self._priority if i not in device]
        host = _first_that_fit(host_bytes - ring_bytes, self._buffer_bytes, rest)
        return Placement(device, host, num_slots)

    def _bytes_when_kept(self, unit_idx: int) -> int:
        unit = self.units[unit_idx]
        has_views = any(not p.needs_copy(self.dtype) for p in unit.parameters)
        return self._copied_bytes[unit_idx] + (self._buffer_bytes[unit_idx] if has_views else 0)

    def _resize_ring(self, num_slots: int) -> None:
        held = len(self._ring.slots) if self._ring else 0
        if num_slots == held:
            return
        self._drop_ring()
        self._ring_account.release("weight ring", held * self.slot_bytes)
        self._ring_account.reserve("weight ring", num_slots * self.slot_bytes)
        if num_slots:
            self._ring = Ring(self.units, self._source, num_slots, self.slot_bytes)

    def _drop_ring(self) -> None:
        if self._ring:
            self._ring.close()
            self._streamed_bytes += self._ring.bytes_read
            self._read_seconds += self._ring.read_seconds
            self._ring = None

    def _read(self, unit: WeightUnit) -> tuple[Tensor, Sequence[int]]:
        buffer = aligned_buffer(self._source.buffer_bytes(unit.tensors))
        return buffer, self._source.read(unit.tensors, as_memoryview(buffer))

    def _load(self, unit: WeightUnit) -> list[Tensor]:
        buffer, offsets = self._read(unit)
        return unit.build(buffer.to(self.device), offsets, self.dtype)

    def _uploaded(self, buffer: Tensor) -> Tensor:
        assert self._upload is not None, "only a device other than the CPU uploads"
        return self._upload.copy(buffer)


def _first_that_fit(budget: int, sizes: Sequence[int], priority: Sequence[int]) -> frozenset[int]:
    used = accumulate(sizes[i] for i in priority)
    return frozenset(i for i, total in zip(priority, used, strict=True) if total <= budget)
