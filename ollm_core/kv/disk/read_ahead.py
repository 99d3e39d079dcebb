"""Reads blocks from disk in a thread, ahead of the attention that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.buffers import as_memoryview
from ollm_core.device.memory import DeviceMemory
from ollm_core.device.transfer import Event
from ollm_core.kv.buffer_pool import BufferPool, Charges
from ollm_core.kv.disk.sizes import DiskSizes
from ollm_core.memory.kinds import MemoryKind


@dataclass(frozen=True, slots=True)
class Staging:
    """A buffer for a run of slots of a layer, and its blocks [B, 2, G, block_size, D]."""

    buffer: memoryview
    blocks: Tensor


Fill = Callable[[int, Sequence[int], Staging], None]
"""Brings consecutive slots of a layer into a staging. Raises ReadError."""


class ReadAhead:
    """Runs of slots that lie side by side. Each iterator has two stagings: one is read into while
    the other is used.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        sizes: DiskSizes,
        charges: Charges,
        memory: DeviceMemory,
        reader: Executor,
    ) -> None:
        """What is read is for a device with `memory`. `reader` is one thread, the owner's to shut
        down. Raises DoesNotFitError.
        """
        self._geometry = geometry
        self._sizes = sizes
        self._memory = memory
        self._reader = reader
        lane_bytes = sizes.lane_bytes
        self._stagings = BufferPool(
            lambda: (memory.host_buffer(lane_bytes), memory.host_buffer(lane_bytes)),
            2 * lane_bytes,
            MemoryKind.KV_STAGING,
            charges,
        )

    def runs(self, layer_idx: int, blocks: Sequence[int], fill: Fill) -> Iterator[Tensor]:
        """`blocks` of a layer in turn, [B, 2, G, block_size, D], valid until the next step. `fill`
        is called in the thread that reads. Raises what it raises.
        """
        run_slots = self._sizes.run_slots[layer_idx]
        runs = [
            run[start : start + run_slots]
            for run in consecutive(blocks)
            for start in range(0, len(run), run_slots)
        ]
        if not runs:
            return
        with self._stagings.lane() as buffers:
            longest = max(map(len, runs))
            stagings = [self._staging(layer_idx, buffer, longest) for buffer in buffers]
            coming = self._begin(layer_idx, runs[0], stagings[0], fill)
            try:
                for i, run in enumerate(runs):
                    coming.result()
                    if i + 1 < len(runs):
                        coming = self._begin(layer_idx, runs[i + 1], stagings[(i + 1) % 2], fill)
                    yield stagings[i % 2].blocks[: len(run)]
            finally:
                _finish(coming)  # before others get the staging

    @contextmanager
    def buffer(self) -> Iterator[Tensor]:
        """A uint8 host buffer for the `with` block. Raises DoesNotFitError."""
        with self._stagings.lane() as (buffer, _):
            yield buffer

    def clear(self) -> None:
        """Let go of the stagings, when the thread has ended."""
        self._stagings.close()

    def _begin(
        self, layer_idx: int, run: Sequence[int], staging: Staging, fill: Fill
    ) -> Future[None]:
        """Read when the device has what was uploaded from there."""
        copied = self._memory.copied()
        return self._reader.submit(_fill_after, copied, fill, layer_idx, run, staging)

    def _staging(self, layer_idx: int, buffer: Tensor, num_slots: int) -> Staging:
        first = self._geometry.as_block(layer_idx, buffer)
        slot = self._sizes.slot_bytes[layer_idx] // first.itemsize  # elements from block to block
        blocks = first.as_strided((num_slots, *first.shape), (slot, *first.stride()))
        return Staging(as_memoryview(buffer), blocks)


def consecutive(numbers: Sequence[int]) -> list[list[int]]:
    """`numbers` cut where the next is not one more."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _fill_after(
    copied: Event | None, fill: Fill, layer_idx: int, run: Sequence[int], staging: Staging
) -> None:
    if copied is not None:
        copied.synchronize()
    fill(layer_idx, run, staging)


def _finish(coming: Future[None]) -> None:
    """Wait, whatever comes of it."""
    if not coming.cancel():
        coming.exception()
