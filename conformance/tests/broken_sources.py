"""Reading engines with one fault each, on top of a plain one."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from dataclasses import replace

import torch
from broken import BrokenPart

from ollm_conformance import ByteSourceConformance
from ollm_core import ByteSource, ReadError
from ollm_core.device.buffers import HUGE_PAGE, PAGE, round_up
from ollm_core.weights.sources.posix import DirectSource


class PlainSource(ByteSource):
    """Reads tensor by tensor, each to a page of its own."""

    name = "plain"

    def __init__(self, paths):
        self._count = 0
        self._lock = threading.Lock()
        self.files = {}
        try:
            for path in paths:
                self.files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise

    def places(self, tensors):
        """Where each tensor goes, and where the last one ends."""
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end + tensor.offset % PAGE)
            end += round_up(tensor.offset % PAGE + tensor.num_bytes)
        return offsets, end

    def read(self, tensors, buffer):
        offsets, _ = self.places(tensors)
        for tensor, place in zip(tensors, offsets, strict=True):
            self.fetch(tensor.path, tensor.offset, buffer[place : place + tensor.num_bytes])
        self.count(sum(tensor.num_bytes for tensor in tensors))
        return offsets

    def count(self, num_bytes):
        with self._lock:
            self._count += num_bytes

    def fetch(self, path, offset, part):
        """Bring the bytes at `offset` into `part`."""
        done = 0
        while done < len(part):
            try:
                count = os.preadv(self.files[path], [part[done:]], offset + done)
            except OSError as error:
                raise ReadError(f"{path}: {error.strerror}") from error
            if not count:
                raise ReadError(f"{path}: ends at byte {offset + done}")
            done += count

    def buffer_bytes(self, tensors):
        return self.places(tensors)[1]

    @property
    def bytes_read(self):
        return self._count

    def close(self):
        while self.files:
            os.close(self.files.popitem()[1])


def suite_of(source):
    """The suite for a reading engine."""

    class Suite(ByteSourceConformance):
        over_2gib = issubclass(source, DirectSource)  # others would fill the page cache

        @classmethod
        def open_source(cls, paths):
            return source(paths)

    return Suite


class ZerosForErrors(PlainSource):
    def fetch(self, path, offset, part):
        try:
            super().fetch(path, offset, part)
        except ReadError:
            part[:] = bytes(len(part))


class ShortReadUnnoticed(PlainSource):
    def fetch(self, path, offset, part):
        os.preadv(self.files[path], [part], offset)


class ShortReadRefused(PlainSource):
    def fetch(self, path, offset, part):
        try:
            count = os.preadv(self.files[path], [part], offset)
        except OSError as error:
            raise ReadError(f"{path}: {error.strerror}") from error
        if count < len(part) < HUGE_PAGE:
            raise ReadError(f"{path}: too short")
        super().fetch(path, offset + count, part[count:])


class RawErrors(PlainSource):
    def fetch(self, path, offset, part):
        if os.preadv(self.files[path], [part], offset) < len(part):
            raise ReadError(f"{path}: too short")


class OffByAPage(PlainSource):
    def fetch(self, path, offset, part):
        super().fetch(path, offset - PAGE if offset > 500_000 else offset, part)


class FirstFileOnly(PlainSource):
    def fetch(self, path, offset, part):
        super().fetch(path if len(part) > 2000 else next(iter(self.files)), offset % 9000, part)


class SortedOffsets(PlainSource):
    def read(self, tensors, buffer):
        by_place = sorted(tensors, key=lambda tensor: (str(tensor.path), tensor.offset))
        return super().read(by_place, buffer)

    def places(self, tensors):
        return super().places(sorted(tensors, key=lambda tensor: (str(tensor.path), tensor.offset)))


class OverlapsLost(PlainSource):
    """Tensors that share bytes are rare, and wrong here."""

    def read(self, tensors, buffer):
        offsets = super().read(tensors, buffer)
        for one, place in zip(tensors, offsets, strict=True):
            for other in tensors:
                if (
                    other.path == one.path
                    and one.offset < other.offset < one.offset + one.num_bytes
                ):
                    buffer[place + other.offset - one.offset] ^= 1
        return offsets


class WritesBehindTheBuffer(PlainSource):
    def read(self, tensors, buffer):
        offsets = super().read(tensors, buffer)
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        ctypes.memset(start + self.buffer_bytes(tensors), 0, 64)
        return offsets


class BufferTooSmall(PlainSource):
    def buffer_bytes(self, tensors):
        return sum(tensor.num_bytes for tensor in tensors)


class Packed(PlainSource):
    def places(self, tensors):
        offsets, end = [], 1
        for tensor in tensors:
            offsets.append(end)
            end += tensor.num_bytes
        return offsets, end


class SharedStaging(PlainSource):
    """One buffer for all calls, without a lock."""

    staging = bytearray()

    def fetch(self, path, offset, part):
        self.staging = bytearray(len(part))
        super().fetch(path, offset, memoryview(self.staging))
        time.sleep(0.001)
        part[:] = self.staging[: len(part)].ljust(len(part))


class CountsNothing(PlainSource):
    def count(self, num_bytes):
        pass


class CountsTwice(PlainSource):
    def count(self, num_bytes):
        super().count(4 * num_bytes + 500_000)


class LeavesAFileOpen(PlainSource):
    def close(self):
        if self.files:
            self.files.popitem()
        super().close()


class LeavesFilesOpenOnFailure(PlainSource):
    def __init__(self, paths):
        super().__init__(path for path in paths if path.exists())
        if len(self.files) < len(list(paths)):
            raise FileNotFoundError(paths[-1])


class OffsetsOf31Bits(PlainSource):
    def fetch(self, path, offset, part):
        super().fetch(path, offset % (1 << 31), part)


class OffsetsOf32Bits(PlainSource):
    def fetch(self, path, offset, part):
        super().fetch(path, offset % (1 << 32), part)


class OffsetsInFloat32(PlainSource):
    """Pages are counted in float32: far ones come in twos."""

    def fetch(self, path, offset, part):
        rounded = int(torch.tensor(offset, dtype=torch.float32))
        super().fetch(path, rounded if offset > 1 << 24 else offset, part)


class OneCall(DirectSource):
    """What a second call would bring is left as it was."""

    def _read_run(self, run, buffer):
        if os.preadv(self._files[run.path], [buffer], run.offset) < min(run.needed, 1 << 20):
            raise run.ended(run.offset)


class TwoGigabytesAtMost(DirectSource):
    def _read_run(self, run, buffer):
        most = min(run.needed, (1 << 31) - 1)
        super()._read_run(replace(run, needed=most), buffer)


class RefusesMuch(DirectSource):
    def _read_run(self, run, buffer):
        count = os.preadv(self._files[run.path], [buffer], run.offset)
        if count < run.needed:
            raise run.ended(run.offset + count)


class ReadsKept(PlainSource):
    """Bytes of each reading are kept."""

    def __init__(self, paths):
        self.kept = []
        super().__init__(paths)

    def fetch(self, path, offset, part):
        super().fetch(path, offset, part)
        self.kept.append(bytearray(part))


class FilesKept(PlainSource):
    """A private copy of each file is held in a map."""

    def __init__(self, paths):
        super().__init__(paths)
        self.copies = []
        for path in paths:
            if path.stat().st_size > 1 << 20:
                with path.open("rb") as file:
                    copy = mmap.mmap(-1, min(path.stat().st_size, 1 << 26))
                    copy.write(file.read(len(copy)))
                self.copies.append(copy)


class OnePlaceForAllThreads(PlainSource):
    """What is read is where the file is at; another thread may have moved that."""

    def fetch(self, path, offset, part):
        done = 0
        os.lseek(self.files[path], offset, os.SEEK_SET)
        time.sleep(1e-5)  # so that it happens for sure
        while done < len(part):
            count = os.readv(self.files[path], [part[done : done + (1 << 18)]])
            if count <= 0:
                raise ReadError(f"{path}: shorter than it was")
            done += count


class OneTurnOnly(PlainSource):
    """Beside others it reads the first pages of a place and leaves the rest."""

    most = 1 << 62

    def take_turns(self, with_others):
        self.most = PAGE if with_others else 1 << 62

    def fetch(self, path, offset, part):
        super().fetch(path, offset, part[: self.most])


class PlaceInAnyFile(PlainSource):
    """The last place that was read is known, but not of which file it was."""

    last = None

    def fetch(self, path, offset, part):
        place = offset, len(part)
        if self.last and self.last[0] == place and len(part) > 16:
            part[:] = self.last[1]
        else:
            super().fetch(path, offset, part)
            self.last = place, bytes(part)


BROKEN_SOURCES = [
    BrokenPart(name, fault, suite_of(source), f"byte-source.{check}")
    for name, fault, source, check in [
        ("zeros-for-errors", "A read that fails gives zeros.", ZerosForErrors, "shrunk-file"),
        ("short-read", "A read that brings too little goes unnoticed.",
         ShortReadUnnoticed, "shrunk-file"),
        ("short-read-refused", "A read that brings too little is an error.",
         ShortReadRefused, "short-reads"),
        ("raw-errors", "Errors of the operating system come through as they are.",
         RawErrors, "failing-storage"),
        ("off-by-a-page", "Far offsets are read a page too early.", OffByAPage, "bytes"),
        ("first-file-only", "Small tensors are read from the first file.",
         FirstFileOnly, "bytes"),
        ("one-turn-only", "Beside others a place is read in part.", OneTurnOnly, "bytes"),
        ("sorted-offsets", "Offsets come in the order of the file.", SortedOffsets, "order"),
        ("overlaps-lost", "Tensors that overlap in the file spoil each other.",
         OverlapsLost, "any-layout"),
        ("writes-behind", "Bytes behind the buffer are overwritten.",
         WritesBehindTheBuffer, "buffer"),
        ("buffer-too-small", "The buffer that is asked for is too small.",
         BufferTooSmall, "buffer"),
        ("packed", "Tensors are packed without regard to alignment.", Packed, "alignment"),
        ("shared-staging", "Threads share a buffer without a lock.", SharedStaging, "threads"),
        ("counts-nothing", "No bytes are counted.", CountsNothing, "bytes-read"),
        ("counts-too-much", "More bytes are counted than are read.", CountsTwice, "bytes-read"),
        ("offsets-of-31-bits", "Offsets have 31 bits.", OffsetsOf31Bits, "far-offsets"),
        ("offsets-of-32-bits", "Offsets have 32 bits.", OffsetsOf32Bits, "far-offsets"),
        ("offsets-in-float32", "Offsets are rounded to float32.",
         OffsetsInFloat32, "far-offsets"),
        ("one-call", "What one call does not bring is missing.", OneCall, "over-2gib"),
        ("two-gigabytes", "No more than 2 GiB of a tensor are read.",
         TwoGigabytesAtMost, "over-2gib"),
        ("refuses-much", "A tensor that one call does not bring is an error.",
         RefusesMuch, "over-2gib"),
        ("reads-kept", "The bytes of all readings are kept.", ReadsKept, "memory"),
        ("files-kept", "A copy of the files is held in memory.", FilesKept, "memory"),
        ("one-place-for-all", "Threads share a file's position.", OnePlaceForAllThreads, "walk"),
        ("place-in-any-file", "A place that was read last is taken for that of any file.",
         PlaceInAnyFile, "walk"),
        ("leaves-open", "A closed source leaves a file open.", LeavesAFileOpen, "closed"),
        ("leaves-open-on-failure", "Files stay open when opening fails.",
         LeavesFilesOpenOnFailure, "open-failed"),
    ]
]  # fmt: skip

GOOD_SOURCES = [suite_of(PlainSource)]
