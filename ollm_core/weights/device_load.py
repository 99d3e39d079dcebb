"""Loads resident weights onto a device with memory of its own, in pieces, through a small host
buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.tensors import TensorInfo
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.buffers import PAGE, as_memoryview, round_up
from ollm_core.device.transfer import Bus, Event
from ollm_core.weights.units import WeightUnit

_PIECE_BYTES = 8 << 20  # a multiple of PAGE
_NUM_BUFFERS = 2  # one is read into while the other is copied


def staging_bytes(units: Iterable[WeightUnit], source: ByteSource) -> int:
    """Host memory that it takes to read any of `units` so."""
    distinct = {(t.offset % PAGE, t.num_bytes): t for unit in units for t in unit.tensors}
    pieces = (piece for tensor in distinct.values() for piece in _pieces(tensor))
    return _NUM_BUFFERS * max(source.buffer_bytes([piece]) for piece in pieces)


class DeviceLoader(Closing):
    """Reads units of weights to a device; one piece while another is copied."""

    def __init__(self, source: ByteSource, bus: Bus, num_bytes: int) -> None:
        """`num_bytes` is what `staging_bytes` says of the units; it is taken with the first."""
        self._source = source
        self._bus = bus
        self._buffer_bytes = num_bytes // _NUM_BUFFERS
        self._buffers: list[Tensor] = []

    def read(self, unit: WeightUnit) -> tuple[Tensor, Sequence[int]]:
        """The bytes of a unit's tensors, side by side on the device, and where each begins.

        Operators that are called from now on may use them. Raises ReadError.
        """
        bus = self._bus
        target = bus.device_buffer(unit.packed_bytes)
        bus.copying.wait_event(bus.computing.record_event())  # whoever had this memory before
        if not self._buffers:
            self._buffers = [bus.host_buffer(self._buffer_bytes) for _ in range(_NUM_BUFFERS)]
        copied: list[Event | None] = [None] * _NUM_BUFFERS
        turn = 0
        try:
            for tensor, place in zip(unit.tensors, unit.packed_places, strict=True):
                for piece in _pieces(tensor):
                    if (before := copied[turn]) is not None:
                        before.synchronize()
                    buffer = self._buffers[turn]
                    [offset] = self._source.read([piece], as_memoryview(buffer))
                    begin = place + piece.offset - tensor.offset
                    content = buffer[offset : offset + piece.num_bytes]
                    bus.copy(target[begin : begin + piece.num_bytes], content)
                    copied[turn] = bus.copied()
                    turn = (turn + 1) % _NUM_BUFFERS
        finally:  # before the memory at either end may be used for something else
            bus.copied().synchronize()
        return target, unit.packed_places

    def close(self) -> None:
        """Give the host memory back."""
        self._buffers.clear()


def _pieces(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """The bytes of a tensor in parts that begin and end with pages of its file."""
    begin, end = tensor.offset, tensor.offset + tensor.num_bytes
    while begin < end:
        stop = min(round_up(begin + 1, PAGE) + _PIECE_BYTES - PAGE, end)
        yield replace(
            tensor,
            name=f"{tensor.name}, bytes {begin} to {stop} of the file",
            dtype="U8",
            shape=(stop - begin,),
            offset=begin,
            num_bytes=stop - begin,
        )
        begin = stop
