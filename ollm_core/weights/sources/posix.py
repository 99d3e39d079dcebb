"""The reading engines `direct` (O_DIRECT) and `mmap`, and the choice of an engine by name."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ollm_core.contracts.tensors import TensorInfo
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.buffers import ALIGNMENT, PAGE, aligned_buffer, as_memoryview
from ollm_core.errors import InputError, ReadError
from ollm_core.weights.sources.kvikio import KvikioSource
from ollm_core.weights.sources.page_aligned import PageAlignedSource, Run

_MAX_READ = 1 << 30  # the kernel caps one call just below 2 GiB
_TURN_BYTES = 16 << 20  # of one call beside others, who wait for it: a few milliseconds

READERS = ("direct", "mmap", "kvikio")
"""The built-in engines by name."""


class DirectSource(PageAlignedSource):
    """O_DIRECT: the disk writes into the buffer itself, past the page cache. One call per run where
    it can be: a disk serves calls in their order, so that a small one waits for all of a large one.
    """

    name = "direct"

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open `paths` and try one read. Raises OSError with EINVAL where the file system refuses
        O_DIRECT.
        """
        super().__init__()
        self._most = _MAX_READ
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

    def _read_run(self, run: Run, buffer: memoryview) -> None:
        done = 0
        while done < run.needed:
            try:
                count = os.preadv(
                    self._files[run.path], [buffer[done : done + self._most]], run.offset + done
                )
            except OSError as error:
                raise ReadError(f"{run.path}: reading failed: {error.strerror}") from error
            if count <= 0 or (count % PAGE and done + count < run.needed):
                raise run.ended(run.offset + done + max(count, 0))
            done += count

    def take_turns(self, with_others: bool) -> None:
        self._most = _TURN_BYTES if with_others else _MAX_READ

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class MmapSource(PageAlignedSource):
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

    def _read_run(self, run: Run, buffer: memoryview) -> None:
        file, mapped = self._maps[run.path]
        # Reading a map past the end of its file kills the process, so look at the file first.
        if (size := os.fstat(file).st_size) < run.offset + run.needed:
            raise run.ended(size)
        with memoryview(mapped) as view:
            buffer[: run.needed] = view[run.offset : run.offset + run.needed]

    def close(self) -> None:
        while self._maps:
            file, mapped = self._maps.popitem()[1]
            mapped.close()
            os.close(file)


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
        if (offset - tensor.offset) % ALIGNMENT:
            raise ReadError(
                f"{tensor.name} was put at {offset}, expected the offset in its file, "
                f"{tensor.offset}, modulo {ALIGNMENT}"
            )


def open_source(paths: Sequence[Path], reader: str = "auto") -> ByteSource:
    """The reading engine named by `reader`: one of `READERS`, or "auto", which tries a direct read
    first, and then maps.

    Raises InputError for another name, if "direct" is asked for where the file system refuses it,
    or "kvikio" where it is not installed or cannot read.
    """
    if reader not in ("auto", *READERS):
        raise InputError(
            f"unknown reading engine {reader!r}", hint=f"one of: auto, {', '.join(READERS)}"
        )
    try:
        if reader == "kvikio":
            return KvikioSource(paths)
        if reader != "mmap" and hasattr(os, "O_DIRECT"):
            try:
                return DirectSource(paths)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
        if reader != "direct":
            return MmapSource(paths)
    except OSError as error:
        raise ReadError(f"{error.filename}: {error.strerror}") from error
    raise InputError(
        f"{paths[0].parent}: the file system refuses O_DIRECT", hint="use reader='mmap'"
    )
