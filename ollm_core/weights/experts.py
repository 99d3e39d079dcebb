"""Routed experts over the tiers: some are kept, the others are read when a layer wants them, in
groups.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ollm_core.buffers import aligned_buffer, round_up
from ollm_core.interfaces import ByteSource, Closing
from ollm_core.memory import MemoryAccount
from ollm_core.weights.groups import Filled, GroupReader, cut_groups
from ollm_core.weights.units import ALIGNMENT, TORCH_DTYPES, Parameter, WeightUnit
from ollm_core.weights.upload import Upload

ExpertId = tuple[int, int]
"""Layer and number of an expert."""

ExpertPriority = Callable[[Mapping[int, int]], Sequence[ExpertId]]
"""Which experts to keep while there is room, those first that matter most; what it leaves out is
never kept. Gets the number of experts of each layer that has some.
"""

_GROUP_BYTES = 32 << 20  # a read that large runs at the speed of the disk


def evenly(num_experts: Mapping[int, int]) -> Sequence[ExpertId]:
    """The first expert of each layer, then the second: as many of one layer as of another."""
    most = max(num_experts.values(), default=0)
    return [(i, e) for e in range(most) for i, count in num_experts.items() if e < count]


@dataclass(slots=True)
class ExpertCounters:
    """What an expert store has done so far: routed are hit or read, unless a pass fails."""

    routed: int = 0
    hit: int = 0
    read: int = 0
    bytes_read: int = 0
    kept_bytes: int = 0
    """Of those, read to be kept."""
    read_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """How many experts are kept on the device and, after those, in host memory; the size of the two
    buffers for the others; what all that takes.
    """

    num_device: int = 0
    num_host: int = 0
    slot_bytes: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    buffer_bytes: int = 0


class ExpertStore(Closing):
    """The experts of one model. Empty for a dense one."""

    def __init__(
        self,
        units: Mapping[int, Sequence[WeightUnit]],
        source: ByteSource,
        dtype: torch.dtype,
        device: torch.device,
        accounts: tuple[MemoryAccount, MemoryAccount],
        priority: ExpertPriority = evenly,
    ) -> None:
        """`units` by layer, then by expert. `accounts` are those of the device and the host; on a
        CPU everything counts as device memory.
        """
        self.counters = ExpertCounters()
        self._units = units
        self._source = source
        self._dtype = dtype
        self._on_cpu = device.type == "cpu"
        self._device_account, self._host_account = accounts
        self._buffer_account = accounts[0] if self._on_cpu else accounts[1]
        every = [unit for layer in units.values() for unit in layer]
        self._one_bytes = max((source.buffer_bytes(unit.tensors) for unit in every), default=0)
        most = max(map(len, units.values()), default=0)
        self._group_bytes = max(self._one_bytes, min(_GROUP_BYTES, most * self._one_bytes))
        order = priority({layer_idx: len(layer) for layer_idx, layer in units.items()})
        self._rank = {expert: rank for rank, expert in enumerate(order)}
        self._last_rank = len(order)
        kept = [units[layer_idx][e] for layer_idx, e in order]
        # What the first of them take, by how many they are.
        self._device_sums = [0, *accumulate(_finished_bytes(unit, dtype) for unit in kept)]
        self._host_sums = [0, *accumulate(_packed_bytes(unit) for unit in kept)]
        self._on_device: dict[ExpertId, Sequence[Tensor]] = {}
        self._on_host: dict[ExpertId, tuple[Tensor, Sequence[int]]] = {}
        self._placement = ExpertPlacement()
        self._reader: GroupReader | None = None
        self._uploads: tuple[Upload, Upload] | None = None
        self.fixed_device_bytes = max((_made_bytes(unit, dtype) for unit in every), default=0)
        """Held on the device whatever the placement, reserved by the owner: one expert in
        conversion, and what is uploaded.
        """
        if every and not self._on_cpu:
            one = max(map(_packed_bytes, every))
            self._uploads = Upload(device, self._group_bytes), Upload(device, one)
            self.fixed_device_bytes += self._group_bytes + one

    @property
    def least_bytes(self) -> int:
        """The least that the two buffers take: of the device's memory on a CPU, else of the
        host's.
        """
        return 2 * self._one_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters of kept experts, in the compute dtype."""
        return self._device_sums[self._placement.num_device + self._placement.num_host]

    def place(self, device_bytes: int, host_bytes: int) -> ExpertPlacement:
        """What is best held in that much memory, `least_bytes` being there."""
        if not self._units:
            return ExpertPlacement()
        room = device_bytes if self._on_cpu else host_bytes
        slot_bytes = self._one_bytes
        while slot_bytes < self._group_bytes and 2 * min(2 * slot_bytes, self._group_bytes) * 4 <= (
            room
        ):
            slot_bytes = min(2 * slot_bytes, self._group_bytes)
        buffers = 2 * slot_bytes
        num_device = _count(self._device_sums, 0, device_bytes - buffers * self._on_cpu)
        num_host = 0
        if not self._on_cpu:
            num_host = _count(self._host_sums, num_device, host_bytes - buffers)
        on_device = self._device_sums[num_device]
        on_host = self._host_sums[num_device + num_host] - self._host_sums[num_device]
        return ExpertPlacement(num_device, num_host, slot_bytes, on_device, on_host, buffers)

    def shrink(self, wanted: ExpertPlacement) -> None:
        """Free what is held and not in `wanted`."""
        held = self._placement
        first_host, end_host = wanted.num_device, wanted.num_device + wanted.num_host
        if wanted.num_device < held.num_device:
            for expert in [e for e in self._on_device if self._rank[e] >= wanted.num_device]:
                del self._on_device[expert]
        for expert in [e for e in self._on_host if not first_host <= self._rank[e] < end_host]:
            del self._on_host[expert]
        if wanted.slot_bytes != held.slot_bytes and self._reader is not None:
            self._reader.close()
            self._reader = None
        same_slots = wanted.slot_bytes == held.slot_bytes
        self._hold(
            ExpertPlacement(
                min(held.num_device, wanted.num_device),
                min(held.num_host, wanted.num_host),
                held.slot_bytes if same_slots else 0,
                min(held.device_bytes, wanted.device_bytes),
                min(held.host_bytes, wanted.host_bytes),
                held.buffer_bytes if same_slots else 0,
            )
        )

    def grow(self, wanted: ExpertPlacement) -> None:
        """Reserve what `wanted` takes, after `shrink`. Raises DoesNotFitError."""
        self._hold(wanted)

    @contextmanager
    def experts(
        self, layer_idx: int, expert_ids: Iterable[int]
    ) -> Iterator[Iterator[tuple[int, Sequence[Tensor]]]]:
        """See WeightStreamer."""
        wanted = sorted(set(expert_ids))
        missing = [
            e
            for e in wanted
            if (layer_idx, e) not in self._on_device and (layer_idx, e) not in self._on_host
        ]
        self.counters.routed += len(wanted)
        if not missing:
            yield self._walk(layer_idx, wanted, iter(()))
            return
        slot_bytes = self._placement.slot_bytes
        if self._reader is None:
            self._reader = GroupReader(self._source, slot_bytes)
        groups = list(cut_groups(missing, self._units[layer_idx], self._source, slot_bytes))
        with self._reader.reading(groups) as filled:
            yield self._walk(layer_idx, wanted, filled)

    def close(self) -> None:
        """Stop reading and free everything."""
        self.shrink(ExpertPlacement())
        self.grow(ExpertPlacement())
        self._uploads = None

    def _walk(
        self, layer_idx: int, wanted: Sequence[int], filled: Iterator[Filled]
    ) -> Iterator[tuple[int, Sequence[Tensor]]]:
        waiting: dict[int, tuple[Tensor, Sequence[int]]] = {}
        for expert in wanted:
            unit, key = self._units[layer_idx][expert], (layer_idx, expert)
            if key in self._on_device:
                self.counters.hit += 1
                yield expert, self._on_device[key]
            elif key in self._on_host and expert not in waiting:  # one that came just now is there
                assert self._uploads is not None, "on a CPU nothing is on the host"
                self.counters.hit += 1
                packed, offsets = self._on_host[key]
                yield expert, unit.build(self._uploads[1].copy(packed), offsets, self._dtype)
            else:
                if expert not in waiting:
                    waiting = dict(self._received(next(filled), layer_idx))
                buffer, offsets = waiting.pop(expert)
                if self._rank.get(key, self._last_rank) < self._placement.num_device:
                    self._on_device[key] = _copied(unit.build(buffer, offsets, self._dtype), buffer)
                    yield expert, self._on_device[key]
                else:
                    yield expert, unit.build(buffer, offsets, self._dtype)

    def _received(
        self, filled: Filled, layer_idx: int
    ) -> Iterator[tuple[int, tuple[Tensor, Sequence[int]]]]:
        """Where each expert of a group is on the device. Keeps those of the host's tier."""
        group, buffer = filled.group, filled.buffer
        self.counters.read += len(group.members)
        self.counters.bytes_read += group.num_bytes
        self.counters.read_seconds += filled.seconds
        first_host = self._placement.num_device
        kept = []
        for expert, unit, offsets in zip(group.members, group.units, filled.offsets, strict=True):
            rank = self._rank.get((layer_idx, expert), self._last_rank)
            if rank < first_host + self._placement.num_host:
                kept.append(unit)
                if rank >= first_host:
                    self._on_host[layer_idx, expert] = _packed(unit, buffer, offsets)
        whole = len(kept) == len(group.units)
        self.counters.kept_bytes += (
            group.num_bytes if whole else sum(unit.file_bytes for unit in kept)
        )
        if self._uploads is not None:
            buffer = self._uploads[0].copy(buffer[: group.num_bytes])
            self._uploads[0].wait()
        for expert, offsets in zip(group.members, filled.offsets, strict=True):
            yield expert, (buffer, offsets)

    def _hold(self, now: ExpertPlacement) -> None:
        """Reserve or release, so that as much is held as `now` takes."""
        held, self._placement = self._placement, now
        for account, kind, num_bytes in (
            (self._device_account, "resident experts", now.device_bytes - held.device_bytes),
            (self._host_account, "resident experts", now.host_bytes - held.host_bytes),
            (self._buffer_account, "expert buffers", now.buffer_bytes - held.buffer_bytes),
        ):
            if num_bytes > 0:
                account.reserve(kind, num_bytes)
            else:
                account.release(kind, -num_bytes)


def _count(sums: Sequence[int], first: int, room: int) -> int:
    """How many in a row, from `first` on, fit into `room`, `sums` being those of the first n."""
    return max(bisect_right(sums, sums[first] + room) - 1 - first, 0)


def _finished_bytes(unit: WeightUnit, dtype: torch.dtype) -> int:
    return sum(parameter.num_bytes(dtype) for parameter in unit.parameters)


def _made_bytes(unit: WeightUnit, dtype: torch.dtype) -> int:
    """The most that building holds beside the buffer, results included: parameters are made one
    after another.
    """
    most = made = 0
    for parameter in unit.parameters:
        made += parameter.num_bytes(dtype) if parameter.needs_copy(dtype) else 0
        scratch, converted = parameter.source.scratch_bytes, _converted_bytes(parameter, dtype)
        # Where it is known what the transform makes, scratch is gone when that is converted.
        both = max(scratch, converted) if parameter.source.makes else scratch + converted
        most = max(most, made + both)
    return most


def _converted_bytes(parameter: Parameter, dtype: torch.dtype) -> int:
    """Bytes of a parameter in another form, from which it is then converted."""
    if made := parameter.source.makes:
        return parameter.num_bytes(TORCH_DTYPES[made]) if TORCH_DTYPES[made] != dtype else 0
    stored = [TORCH_DTYPES[tensor.dtype] for tensor in parameter.tensors]
    unaligned = any(t.offset % d.itemsize for t, d in zip(parameter.tensors, stored, strict=True))
    if unaligned or (parameter.source.transform and stored[0] != dtype):
        return sum(tensor.num_bytes for tensor in parameter.tensors) * (1 + unaligned)
    return 0


def _packed_bytes(unit: WeightUnit) -> int:
    return sum(round_up(tensor.num_bytes, ALIGNMENT) for tensor in unit.tensors)


def _packed(
    unit: WeightUnit, buffer: Tensor, offsets: Sequence[int]
) -> tuple[Tensor, Sequence[int]]:
    """The bytes of a unit's tensors side by side in memory of their own, and where each begins."""
    sizes = [round_up(tensor.num_bytes, ALIGNMENT) for tensor in unit.tensors]
    ends = list(accumulate(sizes))
    packed = aligned_buffer(ends[-1])
    places = [end - size for end, size in zip(ends, sizes, strict=True)]
    for tensor, place, offset in zip(unit.tensors, places, offsets, strict=True):
        packed[place : place + tensor.num_bytes] = buffer[offset : offset + tensor.num_bytes]
    return packed, places


def _copied(parameters: Sequence[Tensor], buffer: Tensor) -> list[Tensor]:
    """The same parameters, none of them a view of `buffer`."""
    memory = buffer.untyped_storage().data_ptr()
    return [
        value.clone() if value.untyped_storage().data_ptr() == memory else value
        for value in parameters
    ]
