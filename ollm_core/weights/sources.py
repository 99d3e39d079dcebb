"""Reading engines: O_DIRECT into the caller's pages, and a memory map where the file system refuses
O_DIRECT.

Both read whole pages around each run of neighbouring tensors, so a byte's place in its page is the
same in memory as in the file.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ollm_core.buffers import PAGE, aligned_buffer, as_memoryview, round_up
from ollm_core.errors import InputError, ReadError
from ollm_core.interfaces import ByteSource
from ollm_core.types import TensorInfo

_GAP_BYTES = 64 << 10  # reading this much between two tensors costs less than a second call
_ALIGNMENT = 64  # what ByteSource.read promises, so that a parameter can be a view
_MAX_PLANS = 1024
_MAX_READ = 1 << 30  # the kernel caps one call just below 2 GiB


@dataclass(frozen=True, slots=True)
class _Run:
    """Whole pages of one file: `num_bytes` at `offset`, of which the file must have `needed`."""

    path: Path
    offset: int
    num_bytes: int
    needed: int


def _runs(tensors: Sequence[TensorInfo]) -> Iterator[tuple[_Run, list[TensorInfo]]]:
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


def _run_around(group: list[TensorInfo], end: int) -> _Run:
    start = group[0].offset // PAGE * PAGE
    return _Run(group[0].path, start, round_up(end) - start, end - start)


class _PagedSource(ByteSource):
    """The layout of runs in a buffer, and the count of bytes, for both engines."""

    def __init__(self) -> None:
        self._bytes_read = 0
        self._counting = threading.Lock()
        self._plans: dict[tuple[TensorInfo, ...], tuple[list[_Run], list[int]]] = {}

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

    def _plan(self, tensors: Sequence[TensorInfo]) -> tuple[list[_Run], list[int]]:
        key = tuple(tensors)
        plan = self._plans.get(key)
        if plan is None:
            runs: list[_Run] = []
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

    def _read_run(self, run: _Run, buffer: memoryview) -> None:
        raise NotImplementedError


class DirectSource(_PagedSource):
    """O_DIRECT: the disk writes into the buffer itself, past the page cache. One call per run where
    it can be.
    """

    name = "direct"

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open `paths` and try one read. Raises OSError with EINVAL where the file system refuses
        O_DIRECT.
        """
        super().__init__()
        self._files: dict[Path, int] = {}
        try:
            for path in paths:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            probe = aligned_buffer(PAGE)
            for file in list(self._files.values())[:1]:
                os.preadv(file, [as_memoryview(probe)], 0)
        except BaseException:
            self.close()
            raise

    def _read_run(self, run: _Run, buffer: memoryview) -> None:
        done = 0
        while done < run.needed:
            try:
                count = os.preadv(
                    self._files[run.path], [buffer[done : done + _MAX_READ]], run.offset + done
                )
            except OSError as error:
                raise ReadError(f"{run.path}: reading failed: {error.strerror}") from error
            if count <= 0 or (count % PAGE and done + count < run.needed):
                raise ReadError(
                    f"{run.path}: ends at byte {run.offset + done + max(count, 0)}, "
                    f"expected at least {run.offset + run.needed}",
                    hint="the file changed while the model was open",
                )
            done += count

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class MmapSource(_PagedSource):
    """A memory map, copied into the buffer: works on every file system, at the price of the page
    cache.
    """

    name = "mmap"

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._maps: dict[Path, tuple[int, mmap.mmap]] = {}
        try:
            for path in paths:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._maps[path] = file, mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        except BaseException:
            self.close()
            raise

    def _read_run(self, run: _Run, buffer: memoryview) -> None:
        file, mapped = self._maps[run.path]
        # Reading a map past the end of its file kills the process, so look at the file first.
        if os.fstat(file).st_size < run.offset + run.needed:
            raise ReadError(
                f"{run.path}: ends at byte {os.fstat(file).st_size}, "
                f"expected at least {run.offset + run.needed}",
                hint="the file changed while the model was open",
            )
        with memoryview(mapped) as view:
            buffer[: run.needed] = view[run.offset : run.offset + run.needed]

    def close(self) -> None:
        while self._maps:
            file, mapped = self._maps.popitem()[1]
            mapped.close()
            os.close(file)


class DescribedSource(_PagedSource):
    """The sizes of both, for files that need not be there."""

    name = "described"

    def _read_run(self, run: _Run, buffer: memoryview) -> None:
        raise ReadError(f"{run.path}: is described only, and cannot be read")

    def close(self) -> None:
        """Nothing to do: no file is open."""


def check_source(source: ByteSource, tensors: Iterable[TensorInfo]) -> None:
    """Read the smallest of `tensors` and compare with the files: only this shows that an engine
    works here.

    Raises ReadError if it brings other bytes or puts them elsewhere; and what the engine raises.
    """
    smallest = sorted(tensors, key=lambda tensor: tensor.num_bytes)[:3]
    buffer = aligned_buffer(source.buffer_bytes(smallest))
    offsets = source.read(smallest, as_memoryview(buffer))
    for tensor, offset in zip(smallest, offsets, strict=True):
        with tensor.path.open("rb") as file:
            expected = os.pread(file.fileno(), tensor.num_bytes, tensor.offset)
        if bytes(as_memoryview(buffer)[offset : offset + tensor.num_bytes]) != expected:
            raise ReadError(f"{tensor.path}: other bytes of {tensor.name} than the file has")
        if (offset - tensor.offset) % _ALIGNMENT:
            raise ReadError(
                f"{tensor.name} was put at {offset}, expected the offset in its file, "
                f"{tensor.offset}, modulo {_ALIGNMENT}"
            )


def open_source(paths: Sequence[Path], reader: str = "auto") -> ByteSource:
    """The reading engine named by `reader`: "direct", "mmap", or "auto", which tries a direct read
    first.

    Raises InputError for another name, or if "direct" is asked for where the file system refuses
    it.
    """
    if reader not in ("auto", "direct", "mmap"):
        raise InputError(f"unknown reading engine {reader!r}", hint="one of: auto, direct, mmap")
    if reader != "mmap" and hasattr(os, "O_DIRECT"):
        try:
            return DirectSource(paths)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise ReadError(f"{error.filename}: {error.strerror}") from error
    if reader == "direct":
        raise InputError(
            f"{paths[0].parent}: the file system refuses O_DIRECT", hint="use reader='mmap'"
        )
    return MmapSource(paths)
