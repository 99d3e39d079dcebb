"""Gives the weights of each unit to a pass: resident ones from memory, the others streamed from
disk. `placement` says which are resident.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ollm_core.contracts.weights import ByteSource, WeightStreamer
from ollm_core.device.buffers import as_memoryview
from ollm_core.device.memory import DeviceMemory, OwnMemory, memory_of
from ollm_core.device.upload import UploadCounters
from ollm_core.memory.accounts import Accounts
from ollm_core.memory.budgets import Budgets, LayerLimits
from ollm_core.memory.pair import PerMemory
from ollm_core.profiling import Span, no_span
from ollm_core.weights.device_load import DeviceLoader
from ollm_core.weights.device_prefetch import Arriving, DevicePrefetch, Packed, Send
from ollm_core.weights.embedding import EmbeddingRows
from ollm_core.weights.experts.store import ExpertCounters
from ollm_core.weights.placement import Placement, ResidentWeights
from ollm_core.weights.prefetch import Ring, Slot
from ollm_core.weights.units import Units, WeightUnit


class TieredStreamer(WeightStreamer):
    """Gives out the units of a model. `fit` says how much memory it may hold; it may be called
    between passes.
    """

    def __init__(
        self,
        units: Units,
        source: ByteSource,
        dtype: torch.dtype,
        device: torch.device,
        accounts: Accounts,
        *,
        buffer_bytes: int = 0,
        span: Span = no_span,
        memory: DeviceMemory | None = None,
    ) -> None:
        """`accounts` are those of the device and the host. `memory` is the device's, by default
        as `memory_of` says; where it is the host's, everything counts as device memory.
        `buffer_bytes` are those of the model that are no weights, and held for it. `span`
        measures how long units are waited for. `source` is closed with the weights, and when they
        cannot be opened.
        """
        self.memory = memory = memory or memory_of(device)
        self.resident = ResidentWeights(
            units,
            source,
            dtype,
            device,
            accounts,
            buffer_bytes=buffer_bytes,
            memory=memory,
            timed=span is not no_span,
        )
        self.units = self.resident.units
        self.expert_units = units.experts
        self.dtype = dtype
        self.device = device
        self._source = source
        self._span = span
        self._rows = EmbeddingRows(units.embedding)
        self._device_units: dict[int, list[Tensor]] = {}  # of those kept there, what has been read
        self._host_units: dict[int, Packed] = {}
        self._ring: Ring | None = None
        self._streamed_bytes = 0
        self._read_seconds = 0.0
        self._waited_seconds = 0.0
        self._loading_seconds = 0.0
        self._experts = self.resident.experts
        self._prefetch_to_device: DevicePrefetch | None = None
        self._device_loader: DeviceLoader | None = None
        if isinstance(memory, OwnMemory):
            num_bytes, timed = self.resident.upload_bytes, span is not no_span
            self._prefetch_to_device = DevicePrefetch(
                memory.bus, num_bytes, self._begin, timed=timed
            )
            self._device_loader = DeviceLoader(source, memory.bus, self.resident.staging_bytes)
        self.norm: list[Tensor] = []
        try:
            self.resident.reserve()
            # Copies: a view would keep the whole page that was read.
            if units.norm.parameters:  # OLMo's norm has none
                self.norm = [parameter.clone() for parameter in self._load(units.norm)]
        except BaseException:
            self.close()
            raise

    @property
    def fixed_device_bytes(self) -> int:
        """Held on the device whatever the placement."""
        return self.resident.fixed_device_bytes

    @property
    def spare_bytes(self) -> Sequence[int]:
        """Of `fixed_device_bytes`, by unit, what is not needed once it is made."""
        return self.resident.spare_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one buffer of the ring."""
        return self.resident.slot_bytes

    def limit_layers(self, limits: LayerLimits) -> None:
        """Let `fit` keep no more layers from now on. Between passes."""
        self.resident.limit_layers(limits)

    @property
    def num_device_layers(self) -> int:
        """Layers that are kept on the device."""
        return self.resident.num_device_layers

    @property
    def num_host_layers(self) -> int:
        """Layers that are kept in host memory."""
        return self.resident.num_host_layers

    def wanted_bytes(self, budgets: Budgets) -> PerMemory[int]:
        """What `fit` would hold of each memory within `budgets`."""
        return self.resident.bytes_of(self.resident.place(*budgets))

    def least_bytes(self, device_bytes: int) -> int:
        """The least that `fit` needs of the ring's memory, given `device_bytes` of the device."""
        return self.resident.least_bytes(device_bytes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of parameters that are kept between passes, in the compute dtype."""
        return self.resident.resident_bytes

    @property
    def in_memory(self) -> PerMemory[int]:
        """Bytes of each memory that are taken now, beside `fixed_device_bytes`. What is to be kept
        is read when it is first acquired.
        """
        loaded = Placement(
            frozenset(self._device_units),
            frozenset(self._host_units),
            self.resident.num_slots if self._ring else 0,
            self._experts.in_memory,
            self.resident.num_uploads if self.uploads.num_bytes else 1,
        )
        return self.resident.bytes_of(loaded)

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
    def waited_seconds(self) -> float:
        """Time that passes have waited for the disk: for `bytes_read`, and for what is kept when it
        is loaded. Where the device computes beside the host, the host waits for that, too.
        """
        waiting = self._waited_seconds + (self._ring.waited_seconds if self._ring else 0.0)
        return waiting + self._loading_seconds + self._experts.counters.waited_seconds

    @property
    def reading_seconds(self) -> tuple[float, float]:
        """Time that the reading engine spent, on what is kept, too, and `waited_seconds`."""
        return self.read_seconds + self._loading_seconds, self.waited_seconds

    @property
    def uploads(self) -> UploadCounters:
        """What went to a device with memory of its own, experts included."""
        found = self._experts.uploads
        if self._prefetch_to_device is not None:
            found.add(self._prefetch_to_device.counters)
        return found

    @property
    def reader(self) -> str:
        """The name of the reading engine."""
        return self._source.name

    def take_turns(self, with_others: bool) -> None:
        """See ByteSource."""
        self._source.take_turns(with_others)

    def fit(self, device_bytes: int, host_bytes: int) -> None:
        """Hold at most `device_bytes` and `host_bytes` beside `fixed_device_bytes`, as much as is
        useful of it.

        Drops resident units or plans more of them; those are read when they are first acquired.
        Experts get what the rest leaves. Raises DoesNotFitError if not even the ring fits.
        """
        wanted = self.resident.place(device_bytes, host_bytes)
        for i in self._device_units.keys() - wanted.device:
            del self._device_units[i]
        for i in self._host_units.keys() - wanted.host:
            del self._host_units[i]
        if wanted.num_slots != self.resident.num_slots:
            self._drop_ring()
        if self._prefetch_to_device is not None:
            streamed = [i for i in range(len(self.units)) if i not in wanted.device]
            self._prefetch_to_device.expect(streamed, wanted.num_uploads)
        self.resident.hold(wanted)
        if wanted.num_slots and self._ring is None:
            num_slots, slot_bytes = wanted.num_slots, self.slot_bytes
            self._ring = Ring(self.units, self._source, num_slots, slot_bytes, self.memory)
        if self._ring:
            self._ring.set_order(self.resident.streamed)

    def acquire(self, unit_idx: int) -> AbstractContextManager[Sequence[Tensor]]:
        """See WeightStreamer. `unit_idx` counts in pass order: layers first, then the parts of the
        head.
        """
        if self._prefetch_to_device is not None:
            return self._arrived(self._prefetch_to_device, unit_idx)
        if self.resident.is_on_device(unit_idx):
            return nullcontext(self._kept_on_device(unit_idx))
        assert self._ring is not None, "fit() makes it before anything is streamed"
        return self._read_ahead(self._ring, unit_idx)

    @contextmanager
    def _read_ahead(self, ring: Ring, unit_idx: int) -> Iterator[Sequence[Tensor]]:
        """`acquire` for what is streamed on a CPU."""
        slot: Slot | None = None
        try:
            with self._span("wait for weights", unit_idx=unit_idx):
                slot = ring.take(unit_idx)
                parameters = self._streamed(unit_idx, slot)
            yield parameters
        finally:
            if slot is not None:
                ring.give_back(slot)

    def let_go(self, num_done: int, *, host: bool) -> int:
        """Free kept experts, and what is kept of the first `num_done` units, in host memory or on
        the device; returns the bytes. In the middle of a pass, between two layers' work: what was
        planned to be kept is read again when it is wanted.
        """
        before = self.in_memory
        units: dict[int, Any] = self._host_units if host else self._device_units
        for unit_idx in [i for i in units if i < num_done]:
            del units[unit_idx]
        self._experts.let_go(host=host)
        after = self.in_memory
        return before.host - after.host if host else before.device - after.device

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
        self._drop_ring()
        self._rows.close()
        self._device_units.clear()
        self._host_units.clear()
        self.norm = []
        if self._prefetch_to_device is not None:
            self._prefetch_to_device.close()
        if self._device_loader is not None:
            self._device_loader.close()
        self.resident.close()
        self._source.close()

    def _kept_on_device(self, unit_idx: int) -> Sequence[Tensor]:
        resident = self._device_units.get(unit_idx)
        if resident is None:
            with self._span("wait for weights", unit_idx=unit_idx):
                resident = self._device_units[unit_idx] = self._load(self.units[unit_idx])
        return resident

    @contextmanager
    def _arrived(self, prefetch: DevicePrefetch, unit_idx: int) -> Iterator[Sequence[Tensor]]:
        """`acquire` for a device with memory of its own: the next unit is on its way there while
        this one is used.
        """
        if self.resident.is_on_device(unit_idx):
            parameters = self._kept_on_device(unit_idx)
            with self._span("wait for weights", unit_idx=unit_idx):
                prefetch.look_ahead(unit_idx)
            yield parameters
            return
        with prefetch.arrived(unit_idx, self._span) as (buffer, offsets):
            yield self.units[unit_idx].build(buffer, offsets, self.dtype)

    def _begin(self, unit_idx: int, send: Send, *, wait: bool) -> Arriving | None:
        """Send a unit that is kept in host memory or streamed to the device; None if it is not
        there yet and nobody waits for it.
        """
        if self.resident.is_on_host(unit_idx):
            kept = self._host_units.get(unit_idx)
            if kept is None:
                if not wait:
                    return None
                kept = self._host_units[unit_idx] = self._read(self.units[unit_idx])
            return self._sent(send, unit_idx, *kept)
        ring = self._ring
        assert ring is not None, "fit() makes it before anything is streamed"
        slot = ring.take(unit_idx) if wait else ring.take_ready(unit_idx)
        if slot is None:
            return None
        copied = None
        try:
            arriving = self._sent(send, unit_idx, slot.buffer, slot.offsets)
            copied = arriving[0].copied
        finally:
            ring.give_back(slot, copied)
        return arriving

    def _sent(self, send: Send, unit_idx: int, buffer: Tensor, offsets: Sequence[int]) -> Arriving:
        """In a span, for memory that could not be locked is copied by the host."""
        unit = self.units[unit_idx]
        with self._span("send to the device", num_bytes=unit.file_bytes):
            return send(*unit.parts(buffer, offsets)), unit.packed_places

    def _streamed(self, unit_idx: int, slot: Slot) -> Sequence[Tensor]:
        unit = self.units[unit_idx]
        if self.resident.copied_bytes[unit_idx]:
            return unit.build(slot.buffer, slot.offsets, self.dtype)
        if unit_idx not in slot.built:
            slot.built[unit_idx] = unit.build(slot.buffer, slot.offsets, self.dtype)
        return slot.built[unit_idx]

    def _drop_ring(self) -> None:
        if self._ring:
            self._ring.close()
            self._streamed_bytes += self._ring.bytes_read
            self._read_seconds += self._ring.read_seconds
            self._waited_seconds += self._ring.waited_seconds
            self._ring = None

    def _read(self, unit: WeightUnit) -> tuple[Tensor, Sequence[int]]:
        """Into host memory, to be kept. Beside units that are streamed it does not pay to wait for
        huge pages: what is gained in each pass is hidden behind reading.
        """
        num_bytes, streams = self._source.buffer_bytes(unit.tensors), self._ring is not None
        buffer = self.memory.host_buffer(num_bytes, huge=not streams)
        with self._loading():
            return buffer, self._source.read(unit.tensors, as_memoryview(buffer))

    @contextmanager
    def _loading(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._loading_seconds += time.perf_counter() - start

    def _load(self, unit: WeightUnit) -> list[Tensor]:
        """To be kept on the device. Views of the buffer stay views only where all are: it is freed
        otherwise.
        """
        if self._device_loader is None:
            buffer, offsets = self._read(unit)
        else:
            with self._loading():
                buffer, offsets = self._device_loader.read(unit)
        found = unit.build(buffer, offsets, self.dtype)
        if unit.copied_bytes(self.dtype, packed=self._device_loader is not None) == 0:
            return found
        memory = buffer.untyped_storage().data_ptr()
        return [v.clone() if v.untyped_storage().data_ptr() == memory else v for v in found]
