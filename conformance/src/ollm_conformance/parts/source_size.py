"""Checks of a reading engine with files and tensors of many GiB that are mostly holes; and of what
the process holds for it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.parts.base import PartSuite
from ollm_conformance.process_memory import every_time, process_memory
from ollm_conformance.seeds import drawn
from ollm_core import ByteSource, TensorInfo
from ollm_core.testing import PAGE, aligned_buffer, as_memoryview

EDGES = (1 << 31, 1 << 32)
"""Bytes at which numbers of 32 bits end, with a sign and without."""
ONE_CALL = 0x7FFFF000
"""The most that Linux reads in one call."""
TAIL = 3 << 20
"""Bytes of a tensor that one call does not bring."""
PATCH = 64 << 10
"""Bytes of a sparse file that are written at a time."""
WINDOW = 32 << 20
LARGE = 24 << 20
CANARY = 0xA5
_MAP_FIXED = 0x10


class SparseFile:
    """A file of holes, which read as zeros, with patches of random bytes."""

    def __init__(self, path: Path, num_bytes: int, patches: Sequence[int]) -> None:
        """`patches` are the offsets of patches, ascending, none inside another. Ends the check
        where the file system has no such files.
        """
        generator = drawn(5)
        self.path = path
        self.patches = {
            offset: torch.randint(0, 256, (PATCH,), generator=generator, dtype=torch.uint8)
            for offset in patches
        }
        try:
            with path.open("wb") as file:
                file.truncate(num_bytes)
                for offset, patch in self.patches.items():
                    file.seek(offset)
                    file.write(as_memoryview(patch))
                file.truncate(num_bytes)
        except OSError as error:
            does_not_apply(f"no file of {num_bytes} bytes can be made here: {error.strerror}")

    def tensor(self, offset: int, num_bytes: int) -> TensorInfo:
        """Bytes of it as a tensor."""
        return TensorInfo(f"t{offset}", "U8", (num_bytes,), self.path, offset, num_bytes)

    def content(self, offset: int, num_bytes: int) -> Tensor:
        """What it holds there."""
        found = torch.zeros(num_bytes, dtype=torch.uint8)
        for start, patch in self.patches.items():
            first, end = max(start, offset), min(start + PATCH, offset + num_bytes)
            if first < end:
                found[first - offset : end - offset] = patch[first - start : end - start]
        return found


class SourceSize(PartSuite):
    """Large files, large tensors, and no memory of what was read."""

    over_2gib: ClassVar[bool] = True
    """Whether a tensor of more than 2 GiB is read, which takes a second; one that reads through
    the page cache needs five, and that much of it.
    """

    @classmethod
    def open_source(cls, paths: Sequence[Path]) -> ByteSource:
        """A source for files of the temporary directory."""
        raise NotImplementedError

    @check(
        "byte-source.far-offsets",
        "Tensors that lie beyond 2 and 4 GiB of a file, or across these offsets, arrive byte for "
        "byte.",
        look="offsets into files: they need 64 bits",
    )
    def test_far_offsets(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            half = PATCH // 2
            patches = [0, *(edge - half for edge in EDGES), sum(EDGES) + half]
            file = SparseFile(Path(name, "far.bin"), sum(EDGES) + 2 * PATCH, patches)
            places = [(sum(EDGES) + half + 3, 5001), (17, 4000)]
            for edge in EDGES:
                places += [(edge - 5000, 12_000), (edge + 9_999, 777), (edge - 1, 1), (edge, 1)]
            with self.open_source([file.path]) as source:
                for chosen in (places, *([place] for place in places)):
                    tensors = [file.tensor(*place) for place in chosen]
                    size = source.buffer_bytes(tensors)
                    assert size < WINDOW, (
                        f"{len(chosen)} small tensors far apart: expected a buffer of less than "
                        f"{WINDOW} bytes, got {size}"
                    )
                    buffer = aligned_buffer(size).fill_(CANARY)
                    offsets = source.read(tensors, as_memoryview(buffer))
                    for place, (offset, length) in zip(offsets, chosen, strict=True):
                        assert torch.equal(
                            buffer[place : place + length], file.content(offset, length)
                        ), f"{length} bytes at {offset}: expected those of the file, got others"

    @check(
        "byte-source.over-2gib",
        "A tensor of more than 2 GiB arrives whole, though the system reads less at one call.",
        look="read(): go on after a call that brought less than was asked for",
    )
    def test_over_2gib(self) -> None:
        if not self.over_2gib:
            does_not_apply("over_2gib says that it is not tried")
        with tempfile.TemporaryDirectory() as name:
            start, length = 4096 + 64, ONE_CALL + TAIL
            edge, end = start + ONE_CALL, start + length
            patches = [0, edge - PATCH // 2, end - PATCH]
            file = SparseFile(Path(name, "large.bin"), end + PATCH, patches)
            tensor = file.tensor(start, length)
            with self.open_source([file.path]) as source:
                size = source.buffer_bytes([tensor])
                buffer = folded_buffer(size, TAIL + WINDOW)
                (place,) = source.read([tensor], as_memoryview(buffer[:size]))
            for first, count in ((0, PATCH), (ONE_CALL - PATCH, TAIL + PATCH)):
                found = buffer[place + first : place + first + count]
                wrong = found != file.content(start + first, count)
                assert not bool(wrong.any()), (
                    f"a tensor of {length} bytes: expected those of the file from byte {first} on, "
                    f"got {int(wrong.sum())} others of {count}, the first at byte "
                    f"{first + int(wrong.nonzero()[0])}"
                )

    @check(
        "byte-source.memory",
        "What was read is in the buffer that was given, and nowhere else in the process, however "
        "often it is read.",
        look="copies that are kept: numpy arrays, bytes and maps count too",
    )
    @every_time
    def test_memory(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            file = SparseFile(Path(name, "file.bin"), LARGE + PATCH, [0, LARGE])
            tensors = [[file.tensor(64, LARGE)], [file.tensor(64 + i, 1 << 20) for i in range(9)]]
            with self.open_source([file.path]) as source:
                buffers = [
                    aligned_buffer(source.buffer_bytes(asked)).fill_(CANARY) for asked in tensors
                ]
            del source
            with process_memory() as memory:
                with self.open_source([file.path]) as source:
                    for number in range(3):
                        for asked, buffer in zip(tensors, buffers, strict=True):
                            source.read(asked, as_memoryview(buffer))
                        memory.expect(0, f"after {number + 1} readings", "beside its buffer")
                memory.expect(0, "a closed source", "as before it was opened")


def folded_buffer(num_bytes: int, last: int) -> Tensor:
    """A writable buffer of `num_bytes` that takes little memory: all but the first MiB and the
    `last` bytes of it is one window of memory again and again, and holds what was written there
    last.
    """
    first, size = 1 << 20, -(-num_bytes // PAGE) * PAGE
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    window = os.memfd_create("ollm-window")
    try:
        os.ftruncate(window, WINDOW)
        flags, access = mmap.MAP_SHARED | _MAP_FIXED, mmap.PROT_READ | mmap.PROT_WRITE
        for place in range(first, size - last - WINDOW, WINDOW):
            found = libc.mmap(address + place, WINDOW, access, flags, window, 0)
            if found != address + place:
                raise OSError(ctypes.get_errno(), "memory cannot be mapped again")
    finally:
        os.close(window)
    buffer = torch.frombuffer(mapped, dtype=torch.uint8)
    for part in (buffer[:PAGE], buffer[-last:]):
        part.fill_(CANARY)
    return buffer
