"""The contract of a reading engine."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.parts.base import (
    examples,
    nothing_left,
    open_files,
    refusal,
    switching_often,
    unreadable,
)
from ollm_conformance.parts.source_size import SourceSize
from ollm_conformance.seeds import drawn, run_seed
from ollm_conformance.short_reads import short_reads
from ollm_core import ByteSource, OllmError, ReadError, TensorInfo
from ollm_core.testing import PAGE, aligned_buffer, as_memoryview

SIZES = (3 * PAGE + 17, 700_001, 5)
"""Bytes of the files: the ends are in the middle of a page."""
ALIGNMENT = 64
GAP = 64 << 10
"""Bytes between two tensors that a source may read rather than read twice."""
CANARY = 0xA5

Place = tuple[int, int, int]
"""File, offset, bytes."""

LAYOUTS: dict[str, list[Place]] = {
    "a whole file": [(0, 0, SIZES[0])],
    "the first byte": [(0, 0, 1)],
    "the last byte": [(0, SIZES[0] - 1, 1)],
    "bytes around a page's edge": [(0, PAGE - 1, 1), (0, PAGE, 1), (0, PAGE + 1, 1)],
    "neighbours without a gap": [(1, 1000, 5000), (1, 6000, 7), (1, 6007, 9001)],
    "neighbours with gaps": [(1, 64, 100), (1, 1024, 64), (1, 20_000, 3)],
    "far apart": [(1, 5, 11), (1, 300_000, 4096), (1, 690_000, 10_001)],
    "later ones first": [(1, 600_000, 50), (1, 100, 50), (1, 300_000, 50)],
    "several files": [(1, 699_000, 1001), (0, 4000, 200), (2, 1, 3), (1, 9, 1)],
    "a file shorter than a page": [(2, 0, 5)],
    "one tensor": [(0, 8192, 64)],
}


class Files:
    """Files of random bytes, and what a source should read of them."""

    def __init__(self, directory: Path) -> None:
        generator = drawn(3)
        self.content = [
            torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in SIZES
        ]
        self.paths = [directory / f"{i}" / "weights.bin" for i in range(len(SIZES))]
        for path, content in zip(self.paths, self.content, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.numpy().tobytes())

    def tensors(self, places: Sequence[Place]) -> list[TensorInfo]:
        """Byte tensors at these places."""
        return [
            TensorInfo(f"t{i}", "U8", (length,), self.paths[file], offset, length)
            for i, (file, offset, length) in enumerate(places)
        ]

    def check(self, source: ByteSource, places: Sequence[Place], what: str) -> None:
        """Read, and raise AssertionError unless the right bytes come to where the source says."""
        tensors = self.tensors(places)
        buffer, offsets = read(source, tensors, what)
        for place, (file, offset, length) in zip(offsets, places, strict=True):
            found = buffer[place : place + length]
            expected = self.content[file][offset : offset + length]
            assert torch.equal(found, expected), (
                f"{what}: expected {length} bytes at {offset} of file {file}, got others"
            )


def read(
    source: ByteSource, tensors: Sequence[TensorInfo], what: str
) -> tuple[Tensor, Sequence[int]]:
    """The buffer and the offsets of a read, in a buffer of just the bytes that the source wants."""
    size = source.buffer_bytes(tensors)
    memory = aligned_buffer(size + 2 * PAGE).fill_(CANARY)
    buffer = memory[:size]
    offsets = source.read(tensors, as_memoryview(buffer))
    assert bool((memory[size:] == CANARY).all()), (
        f"{what}: expected nothing written behind the {size} bytes of buffer, got something there"
    )
    assert len(offsets) == len(tensors), (
        f"{what}: expected {len(tensors)} offsets, got {len(offsets)}"
    )
    for tensor, offset in zip(tensors, offsets, strict=True):
        assert 0 <= offset <= size - tensor.num_bytes, (
            f"{what}: expected {tensor.num_bytes} bytes inside a buffer of {size}, got them at "
            f"{offset}"
        )
    return buffer, offsets


def drawn_places(draw: random.Random) -> list[Place]:
    """Some random places, large and small, at times one after the other in two files."""
    places: list[Place] = []
    for _ in range(1 + draw.randrange(3)):
        file = draw.choice([0, 1, 1, 1, 2])
        if places and draw.random() < 0.4:  # the place of the one before, in this file
            _, offset, length = places[-1]
        else:
            offset = draw.randrange(draw.choice([1, SIZES[file]]))
            length = 1 + draw.randrange(draw.choice([8, 5000, SIZES[file]]))
        offset = min(offset, SIZES[file] - 1)
        places.append((file, offset, min(length, SIZES[file] - offset)))
    return places


class ByteSourceConformance(SourceSize):
    """Every check of a reading engine. Subclass it as `TestX` and write `open_source`."""

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[tuple[ByteSource, Files]]:
        """A source and its files; it is closed afterwards."""
        with tempfile.TemporaryDirectory() as name:
            files = Files(Path(name))
            with cls.open_source(files.paths) as source:
                yield source, files

    @check(
        "byte-source.bytes",
        "Tensors arrive byte for byte, wherever they lie in one file or in several.",
        look="read(): offsets that are on no page, runs of neighbours, the last page of a file",
    )
    def test_bytes(self) -> None:
        with self.opened() as (source, files):
            for with_others in (False, True):
                source.take_turns(with_others)
                for what, places in LAYOUTS.items():
                    files.check(source, places, f"{what}, beside others" if with_others else what)

    @check(
        "byte-source.order",
        "Offsets come in the order of the tensors that were asked for.",
        look="read(): what it returns when it sorts tensors by their place",
    )
    def test_order(self) -> None:
        with self.opened() as (source, files):
            places = [(1, 2000 * i, 100 + i) for i in range(12)]
            for order in (places, places[::-1], places[5:] + places[:5]):
                files.check(source, order, f"tensors at {[offset for _, offset, _ in order]}")

    @check(
        "byte-source.any-layout",
        "Whatever tensors are asked for, the right bytes arrive.",
        look="the places (file, offset, bytes) that the message lists: they are the fewest",
    )
    def test_any_layout(self) -> None:
        def place(file: int) -> st.SearchStrategy[Place]:
            size = SIZES[file]
            return st.integers(0, size - 1).flatmap(
                lambda start: st.tuples(
                    st.just(file), st.just(start), st.integers(0, min(size - start, 80_000))
                )
            )

        with self.opened() as (source, files):

            @examples(60)
            @given(st.lists(st.integers(0, 2).flatmap(place), min_size=1, max_size=6))
            def try_layout(places: list[Place]) -> None:
                files.check(source, places, f"layout {places}")

            try_layout()

    @check(
        "byte-source.buffer",
        "A buffer of buffer_bytes is enough, and nothing is written behind it.",
        look="buffer_bytes(), and reads that are rounded up to pages",
    )
    def test_buffer(self) -> None:
        with self.opened() as (source, files):
            for what, places in LAYOUTS.items():
                tensors = files.tensors(places)
                read(source, tensors, what)
                size, wanted = source.buffer_bytes(tensors), sum(t.num_bytes for t in tensors)
                assert wanted <= size, f"{what}: expected {wanted} bytes or more, got {size}"

    @check(
        "byte-source.alignment",
        "What is aligned in its file is aligned in the buffer, so that parameters need no copy.",
        look="read(): keep each byte's place in its page",
    )
    def test_alignment(self) -> None:
        with self.opened() as (source, files):
            places = [(0, 64, 100), (1, 192, 4096), (1, 300_032, 64), (1, 4096, 10)]
            tensors = files.tensors(places)
            _, offsets = read(source, tensors, "aligned tensors")
            for tensor, offset in zip(tensors, offsets, strict=True):
                assert offset % ALIGNMENT == 0, (
                    f"expected byte {tensor.offset} of the file at a multiple of {ALIGNMENT}, "
                    f"got it at {offset}"
                )

    @check(
        "byte-source.threads",
        "Several threads can read at once, each what it asked for.",
        look="read(): state that two calls share",
    )
    def test_threads(self) -> None:
        with self.opened() as (source, files), ThreadPoolExecutor(4) as pool:
            layouts = list(LAYOUTS.items()) * 6
            before = source.bytes_read
            list(pool.map(lambda item: files.check(source, item[1], item[0]), layouts))
            together = source.bytes_read - before
            before = source.bytes_read
            for what, places in layouts:
                files.check(source, places, what)
            alone = source.bytes_read - before
            assert together == alone, f"expected {alone} bytes counted, got {together}"

    @check(
        "byte-source.walk",
        "Whatever several threads ask for at the same moment, much or little, of one file or of "
        "several, each gets its bytes.",
        look="read(): a position in a file, a buffer or a table of readings, which calls share",
    )
    def test_walk(self) -> None:
        draw = random.Random(run_seed())
        with self.opened() as (source, files), ThreadPoolExecutor(4) as pool, switching_often():
            for number in range(100):
                jobs = [[drawn_places(draw) for _ in range(6)] for _ in range(1 + number % 4)]
                told = f"seed {run_seed()}, round {number}, {len(jobs)} threads"
                start = threading.Barrier(len(jobs))

                def work(
                    reads: list[list[Place]],
                    told: str = told,
                    start: threading.Barrier = start,
                ) -> None:
                    start.wait()
                    for places in reads:
                        files.check(source, places, f"{told}, one of which reads {places}")

                list(pool.map(work, jobs))

    @check(
        "byte-source.shrunk-file",
        "A file that became shorter under a reader is an error, never a crash and never other "
        "bytes.",
        look="read(): how many bytes came; a map past the end of its file ends the process",
    )
    def test_shrunk_file(self) -> None:
        for size in (699_999, 655_360 + 100, 655_360, 4096, 1, 0):
            with self.opened() as (source, files):
                os.truncate(files.paths[1], size)
                for place in ((1, 100, 699_901), (1, 650_000, 50_001), (1, size, 1)):
                    (tensor,) = files.tensors([place])
                    what = f"{place[2]} bytes at {place[1]} of a file cut to {size}"
                    line = refusal(ReadError, partial(read, source, [tensor], what), what)
                    assert files.paths[1].name in line, (
                        f"{what}: expected the file's name, got {line}"
                    )
                files.check(source, [(0, 10, 5000)], "another file after the error")

    @check(
        "byte-source.short-reads",
        "Where the operating system gives less than was asked for, the rest is read, too.",
        look="the count that os.preadv returns: go on behind it",
    )
    def test_short_reads(self) -> None:
        with self.opened() as (source, files), short_reads() as cut:
            for what, places in LAYOUTS.items():
                files.check(source, places, f"{what}, in short reads")
        if not cut:
            does_not_apply("it reads otherwise than by the functions of `os`")

    @check(
        "byte-source.failing-storage",
        "Where the storage fails there is an error, and what it did read is right.",
        look="read(): errors of the operating system become ReadError",
    )
    def test_failing_storage(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            files, before = Files(Path(name)), open_files()
            with self.open_source(files.paths) as source:
                mine = [n for n, path in open_files().items() if before.get(n) != path]
                if not mine:
                    does_not_apply("it keeps no file open")
                with unreadable(mine):
                    try:
                        files.check(source, [(1, 300_000, 5000)], "files that cannot be read")
                    except AssertionError:
                        raise
                    except ReadError:
                        pass
                    except Exception as error:
                        raise AssertionError(f"expected ReadError, got {error!r}") from error
                files.check(source, [(1, 300_000, 5000)], "files that can be read again")

    @check(
        "byte-source.bytes-read",
        "The count of bytes has all that was asked for, and no more than the pages around it.",
        look="bytes_read; runs that read the space between tensors",
    )
    def test_bytes_read(self) -> None:
        with self.opened() as (source, files):
            assert source.bytes_read == 0, f"expected 0 at first, got {source.bytes_read}"
            for what, places in LAYOUTS.items():
                for time in ("once", "twice"):
                    before = source.bytes_read
                    files.check(source, places, what)
                    count = source.bytes_read - before
                    least = sum(length for _, _, length in places)
                    most = sum(length + 2 * PAGE + GAP for _, _, length in places)
                    assert least <= count <= most, (
                        f"{what}, {time}: expected {least} to {most} bytes, got {count}"
                    )

    @check(
        "byte-source.closed",
        "A source can be closed twice and leaves no file, map or thread, used or not.",
        look="close()",
    )
    def test_closed(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            files = Files(Path(name))
            for places in ([], LAYOUTS["several files"]):
                with nothing_left(Path(name)):
                    source = self.open_source(files.paths)
                    if places:
                        files.check(source, places, "before closing")
                    source.close()
                    source.close()

    @check(
        "byte-source.open-failed",
        "Opening files of which one is missing leaves none of the others open.",
        look="open: close what is open before the error goes on",
    )
    def test_open_failed(self) -> None:
        with tempfile.TemporaryDirectory() as name, nothing_left(Path(name)):
            paths = [*Files(Path(name)).paths, Path(name, "missing.bin")]
            try:
                source = self.open_source(paths)
            except (OSError, OllmError):
                return
            source.close()
            raise AssertionError("expected an error for a missing file, got none")
