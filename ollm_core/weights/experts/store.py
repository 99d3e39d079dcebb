"""The store of routed experts: some are resident, the others are read in groups when a layer wants
them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.memory import DeviceMemory, OwnMemory, memory_of
from ollm_core.device.transfer import Event
from ollm_core.device.upload import Sent, Upload, UploadCounters
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.kinds import MemoryKind
from ollm_core.memory.pair import PerMemory
from ollm_core.weights.experts.policy import ExpertId, ExpertShares, ExpertTier, Kept
from ollm_core.weights.experts.reader import Filled, GroupReader, cut_groups, member_bytes
from ollm_core.weights.experts.sizes import finished_bytes, fitting, made_bytes, owned, pack
from ollm_core.weights.units import WeightUnit

_STAYS_OUT = -1, -1  # no expert at all
_GROUP_BYTES = 32 << 20  # a read that large runs at the speed of the disk


@dataclass(slots=True)
class ExpertCounters:
    """What an expert store has done so far: routed are hit or read, unless a pass fails."""

    routed: int = 0
    hit: int = 0
    read: int = 0
    bytes_read: int = 0
    kept_bytes: int = 0
    """Of those, read to be kept where there was room."""
    replaced: int = 0
    """Experts that were kept in the place of another."""
    read_seconds: float = 0.0
    waited_seconds: float = 0.0
    """That layers have waited for them."""


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """How many experts are kept on the device and how many others in host memory; the size of the
    two buffers for the rest; what all that takes.
    """

    num_device: int = 0
    num_host: int = 0
    slot_bytes: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    buffer_bytes: int = 0
    upload_bytes: int = 0
    """Of buffers on the device that need not be, to copy beside compute."""


@dataclass(slots=True)
class _Layer:
    """What a layer is about to get: which experts are put into a tier on their way, and what goes
    for each.
    """

    layer_idx: int
    units: Sequence[WeightUnit]
    to_device: Mapping[int, ExpertId | None] = field(default_factory=dict)
    to_host: Mapping[int, ExpertId | None] = field(default_factory=dict)


class ExpertStore(Closing):
    """The experts of one model. Empty for a dense one."""

    def __init__(
        self,
        units: Mapping[int, Sequence[WeightUnit]],
        source: ByteSource,
        dtype: torch.dtype,
        device: torch.device,
        accounts: Accounts,
        *,
        memory: DeviceMemory | None = None,
        timed: bool = False,
    ) -> None:
        """`units` by layer, then by expert. `memory` is the device's, by default as `memory_of`
        says. What is copied to it may be `timed`.
        """
        self.counters = ExpertCounters()
        self._units = units
        self._source = source
        self._dtype = dtype
        self._memory = memory = memory or memory_of(device)
        self._device_account, self._host_account = accounts
        self._buffer_account = memory.read_side(accounts)
        every = [unit for layer in units.values() for unit in layer]
        self._one_bytes = max((member_bytes(unit, source) for unit in every), default=0)
        most = max(map(len, units.values()), default=0)
        self._group_bytes = max(self._one_bytes, min(_GROUP_BYTES, most * self._one_bytes))
        self._num_experts = len(every)
        # Each expert counts as the largest one, unless all are kept.
        finished = [finished_bytes(unit, dtype) for unit in every]
        as_packed = [unit.packed_bytes for unit in every]
        self._finished = max(finished, default=0), sum(finished)
        self._packed = max(as_packed, default=0), sum(as_packed)
        self._shares = ExpertShares({i: len(layer) for i, layer in units.items()})
        self._on_device: ExpertTier[Sequence[Tensor]] = ExpertTier(self._shares)
        self._on_host: ExpertTier[tuple[Tensor, Sequence[int]]] = ExpertTier(self._shares)
        self._copied: dict[ExpertId, Event] = {}
        """When the last copy of an expert that is kept in host memory ends."""
        self._placement = ExpertPlacement()
        self._reader: GroupReader | None = None
        self._uploads: tuple[Upload, Upload] | None = None
        made = (made_bytes(unit, dtype, packed=memory.is_own) for unit in every)
        self.fixed_device_bytes = max(made, default=0)
        """Held on the device whatever the placement, reserved by the owner: one expert in
        conversion, and what is uploaded.
        """
        if every and isinstance(memory, OwnMemory):
            self._uploads = (
                Upload(memory.bus, self._group_bytes, timed=timed),
                Upload(memory.bus, self._packed[0], timed=timed),
            )
            self.fixed_device_bytes += self._uploaded_bytes

    @property
    def placement(self) -> ExpertPlacement:
        """What is held now, or may be as experts are read."""
        return self._placement

    @property
    def uploads(self) -> UploadCounters:
        """What went to a device with memory of its own."""
        found = UploadCounters()
        for upload in self._uploads or ():
            found.add(upload.counters)
        return found

    @property
    def _uploaded_bytes(self) -> int:
        """A group and an expert as they are sent to the device."""
        return self._group_bytes + self._packed[0]

    @property
    def least_bytes(self) -> int:
        """The least that the two buffers take: of the device's memory on a CPU, else of the
        host's.
        """
        return 2 * self._one_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters of kept experts, in the compute dtype."""
        return _taken(
            self._placement.num_device + self._placement.num_host,
            self._num_experts,
            *self._finished,
        )

    @property
    def in_memory(self) -> ExpertPlacement:
        """As much of `placement` as has been read."""
        held = self._placement
        device, host = len(self._on_device), len(self._on_host)
        return replace(
            held,
            num_device=device,
            num_host=host,
            device_bytes=_taken(device, self._num_experts, *self._finished),
            host_bytes=_taken(host, self._num_experts, *self._packed),
            buffer_bytes=held.buffer_bytes if self._reader else 0,
        )

    def place(self, device_bytes: int, host_bytes: int) -> ExpertPlacement:
        """What is best held in that much memory, `least_bytes` being there."""
        if not self._units:
            return ExpertPlacement()
        own_memory = self._memory.is_own
        room = self._memory.read_side(PerMemory(device_bytes, host_bytes))
        slot_bytes = self._one_bytes
        while slot_bytes < self._group_bytes and 2 * min(2 * slot_bytes, self._group_bytes) * 4 <= (
            room
        ):
            slot_bytes = min(2 * slot_bytes, self._group_bytes)
        buffers = 2 * slot_bytes
        total = self._num_experts
        more_uploads = 0
        if own_memory and self._uploaded_bytes <= device_bytes < self._finished[1]:
            more_uploads = self._uploaded_bytes
        taken = more_uploads if own_memory else buffers
        num_device = _count(device_bytes - taken, total, *self._finished)
        num_host = 0
        if own_memory:
            num_host = _count(host_bytes - buffers, total, *self._packed)
            num_host = min(num_host, total - num_device)
        on_device = _taken(num_device, total, *self._finished)
        on_host = _taken(num_host, total, *self._packed)
        return ExpertPlacement(
            num_device, num_host, slot_bytes, on_device, on_host, buffers, more_uploads
        )

    def shrink(self, wanted: ExpertPlacement) -> None:
        """Free what is held and not in `wanted`."""
        held = self._placement
        self._on_device.resize(min(held.num_device, wanted.num_device))
        self._on_host.resize(min(held.num_host, wanted.num_host))
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
                min(held.upload_bytes, wanted.upload_bytes),
            )
        )

    def grow(self, wanted: ExpertPlacement) -> None:
        """Reserve what `wanted` takes, after `shrink`. Raises DoesNotFitError."""
        self._hold(wanted)
        for upload in self._uploads or ():
            upload.resize(2 if wanted.upload_bytes else 1)
        self._on_device.resize(wanted.num_device)
        self._on_host.resize(wanted.num_host)

    def let_go(self, *, host: bool) -> None:
        """Free the experts that are kept in host memory or on the device, and keep no more of them
        until the next placement.
        """
        (self._on_host if host else self._on_device).resize(0)

    @contextmanager
    def experts(
        self, layer_idx: int, expert_ids: Iterable[int]
    ) -> Iterator[Iterator[tuple[int, Sequence[Tensor]]]]:
        """See WeightStreamer."""
        counts = Counter(expert_ids)
        self._shares.note(layer_idx, counts)
        wanted = sorted(counts)
        layer = _Layer(layer_idx, self._units[layer_idx])
        new = [e for e in wanted if (layer_idx, e) not in self._on_device]
        layer.to_device = self._on_device.plan(layer_idx, wanted, new)
        missing = [e for e in new if (layer_idx, e) not in self._on_host]
        rest = [e for e in missing if e not in layer.to_device]
        layer.to_host = self._on_host.plan(layer_idx, wanted, rest)
        self.counters.routed += len(wanted)
        if not missing:
            with closing(self._walk(layer, wanted, iter(()))) as walk:
                yield walk
            return
        slot_bytes = self._placement.slot_bytes
        if self._reader is None:
            self._reader = GroupReader(self._source, slot_bytes, self._memory)
        groups = list(cut_groups(missing, layer.units, self._source, slot_bytes))
        with (
            self._reader.reading(groups) as filled,
            closing(self._walk(layer, wanted, filled)) as walk,
        ):
            yield walk

    def close(self) -> None:
        """Stop reading and free everything."""
        self.shrink(ExpertPlacement())
        self.grow(ExpertPlacement())
        for upload in self._uploads or ():
            upload.close()
        self._uploads = None
        self._copied.clear()
        self._shares = ExpertShares({})
        self._on_device, self._on_host = ExpertTier(self._shares), ExpertTier(self._shares)

    def _walk(
        self, layer: _Layer, wanted: Sequence[int], filled: Iterator[Filled]
    ) -> Generator[tuple[int, Sequence[Tensor]], None, None]:
        group: tuple[Upload, Sent] | None = None
        waiting: dict[int, Sequence[int]] = {}
        try:
            for expert in wanted:
                key = layer.layer_idx, expert
                if key in self._on_device:
                    self.counters.hit += 1
                    yield expert, self._on_device[key]
                    continue
                if key in self._on_host and expert not in waiting:  # that came just now is there
                    self.counters.hit += 1
                    yield from self._from_host(layer, expert)
                    continue
                if expert not in waiting:
                    if group is not None:
                        group[0].release(group[1])
                        group = None
                    start = time.perf_counter()
                    came = next(filled)
                    self.counters.waited_seconds += time.perf_counter() - start
                    buffer = came.buffer
                    if self._uploads is not None:
                        sent = self._uploads[0].send(*came.parts)
                        group = self._uploads[0], sent
                        came.copied = sent.copied
                    waiting = dict(self._received(came, layer))
                    if group is not None:
                        buffer = group[0].receive(group[1])
                        waiting = dict(came.group.packed)
                offsets = waiting.pop(expert)
                yield expert, self._given(layer, expert, buffer, offsets)
        finally:
            if group is not None:
                group[0].release(group[1])

    def _from_host(self, layer: _Layer, expert: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """An expert that is kept in host memory."""
        assert self._uploads is not None, "in one memory nothing is on the host"
        key, upload = (layer.layer_idx, expert), self._uploads[1]
        kept, offsets = self._on_host[key]
        sent = upload.send(kept)
        self._copied[key] = sent.copied
        del kept
        try:
            if expert in layer.to_device:
                self._copied.pop(key)
                self._on_host.pop(key)
            yield expert, self._given(layer, expert, upload.receive(sent), offsets)
        finally:
            upload.release(sent)

    def _given(
        self, layer: _Layer, expert: int, buffer: Tensor, offsets: Sequence[int]
    ) -> Sequence[Tensor]:
        """An expert's parameters from its bytes on the device, kept there if they are to be."""
        parameters: Sequence[Tensor] = layer.units[expert].build(buffer, offsets, self._dtype)
        if expert in layer.to_device:
            goes = layer.to_device[expert]
            parameters = owned(parameters, buffer, self._make_room(self._on_device, goes))
            self._on_device.put((layer.layer_idx, expert), parameters)
        return parameters

    def _received(self, filled: Filled, layer: _Layer) -> Iterator[tuple[int, Sequence[int]]]:
        """Where each expert of a group begins. Keeps those of the host's tier."""
        group, buffer = filled.group, filled.buffer
        self.counters.read += len(group.members)
        self.counters.bytes_read += group.num_bytes
        self.counters.read_seconds += filled.seconds
        kept = []
        for expert, unit, offsets in zip(group.members, group.units, filled.offsets, strict=True):
            goes = layer.to_device.get(expert, layer.to_host.get(expert, _STAYS_OUT))
            if goes is None:
                kept.append(unit)
            if expert in layer.to_host:
                goes, place = layer.to_host[expert], (layer.layer_idx, expert)
                memory = fitting(self._make_room(self._on_host, goes), unit)
                if goes is not None and (copied := self._copied.pop(goes, None)) is not None:
                    copied.synchronize()  # the memory is used again; the copy is mostly long past
                self._on_host.put(place, pack(unit, buffer, offsets, memory, self._memory))
                del memory
        whole = len(kept) == len(group.units)
        self.counters.kept_bytes += (
            group.num_bytes if whole else sum(unit.file_bytes for unit in kept)
        )
        yield from zip(group.members, filled.offsets, strict=True)

    def _make_room(self, tier: ExpertTier[Kept], goes: ExpertId | None) -> Kept | None:
        """Drop `goes` from a tier and return what was held for it, to be used again."""
        if goes is None:
            return None
        self.counters.replaced += 1
        return tier.pop(goes)

    def _hold(self, now: ExpertPlacement) -> None:
        """Reserve or release, so that as much is held as `now` takes."""
        held, self._placement = self._placement, now
        device, host = self._device_account, self._host_account
        for account, kind, num_bytes in (
            (device, MemoryKind.RESIDENT_EXPERTS, now.device_bytes - held.device_bytes),
            (host, MemoryKind.RESIDENT_EXPERTS, now.host_bytes - held.host_bytes),
            (device, MemoryKind.UPLOAD_BUFFERS, now.upload_bytes - held.upload_bytes),
            (self._buffer_account, MemoryKind.EXPERT_BUFFERS, now.buffer_bytes - held.buffer_bytes),
        ):
            if num_bytes > 0:
                account.reserve(kind, num_bytes)
            else:
                account.release(kind, -num_bytes)


def _count(room: int, total: int, largest: int, everything: int) -> int:
    """How many of `total` experts fit into `room`, by the `largest`, if not `everything` does."""
    return total if everything <= room else max(room // largest, 0)


def _taken(count: int, total: int, largest: int, everything: int) -> int:
    """What `count` of `total` experts take at most."""
    return everything if count == total else count * largest
