"""Lays tensors of a file out in a buffer: whole pages around each run of neighbours.

A byte's place in its page is the same in memory as in the file. The built-in reading engines share
this and differ in how they fetch a run.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ollm_core.contracts.tensors import TensorInfo
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.buffers import PAGE, round_up
from ollm_core.errors import ReadError

_GAP_BYTES = 64 << 10  # reading this much between two tensors costs less than a second call
_MAX_PLANS = 1024


@dataclass(frozen=True, slots=True)
class Run:
    """Whole pages of one file: `num_bytes` at `offset`, of which the file must have `needed`."""

    path: Path
    offset: int
    num_bytes: int
    needed: int

    def ended(self, end: int) -> ReadError:
        """What to raise where the file turns out to end at byte `end`, inside what is needed."""
        return ReadError(
            f"{self.path}: ends at byte {end}, expected at least {self.offset + self.needed}",
            hint="the file changed while the model was open",
        )


def _runs(tensors: Sequence[TensorInfo]) -> Iterator[tuple[Run, list[TensorInfo]]]:
    group: list[TensorInfo] = []
    end = 0
    for tensor in sorted(tensors, key=lambda t: (str(t.path), t.offset)):
        if group and (tensor.path != group[0].path or tensor.offset > end + _GAP_BYTES):
            yield _run_around(group, end), group
            group = []
        end = (
            max(end, tensor.offset + tensor.num_bytes)
            if group
            else tensor.offset + tensor.num_bytes
        )
        group.append(tensor)
    if group:
        yield _run_around(group, end), group


def _run_around(group: list[TensorInfo], end: int) -> Run:
    start = group[0].offset // PAGE * PAGE
    return Run(group[0].path, start, round_up(end) - start, end - start)


class PageAlignedSource(ByteSource):
    """The layout of runs in a buffer, and the count of bytes, for every built-in engine."""

    def __init__(self) -> None:
        self._bytes_read = 0
        self._counting = threading.Lock()
        self._plans: dict[tuple[TensorInfo, ...], tuple[list[Run], list[int]]] = {}

    def read(self, tensors: Sequence[TensorInfo], buffer: memoryview) -> Sequence[int]:
        runs, offsets = self._plan(tensors)
        place = 0
        for run in runs:
            self._read_run(run, buffer[place : place + run.num_bytes])
            place += run.num_bytes
        with self._counting:
            self._bytes_read += place
        return offsets

    def buffer_bytes(self, tensors: Sequence[TensorInfo]) -> int:
        return sum(run.num_bytes for run, _ in _runs(tensors))

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def _plan(self, tensors: Sequence[TensorInfo]) -> tuple[list[Run], list[int]]:
        key = tuple(tensors)
        plan = self._plans.get(key)
        if plan is None:
            runs: list[Run] = []
            offset_of: dict[str, int] = {}
            place = 0
            for run, group in _runs(key):
                runs.append(run)
                offset_of |= {t.name: place + t.offset - run.offset for t in group}
                place += run.num_bytes
            plan = runs, [offset_of[tensor.name] for tensor in key]
            if len(self._plans) >= _MAX_PLANS:  # groups of experts are ever new
                self._plans.clear()
            self._plans[key] = plan
        return plan

    @abstractmethod
    def _read_run(self, run: Run, buffer: memoryview) -> None:
        """Bring the first `run.needed` bytes or more of a run into `buffer`, which is page-aligned
        and `run.num_bytes` long. Raises ReadError.
        """


class DescribedSource(PageAlignedSource):
    """The sizes of the others, for files that need not be there."""

    name = "described"

    def _read_run(self, run: Run, buffer: memoryview) -> None:
        raise ReadError(f"{run.path}: is described only, and cannot be read")

    def close(self) -> None:
        """Nothing to do: no file is open."""
