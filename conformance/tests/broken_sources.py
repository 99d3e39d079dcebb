"""Reading engines with one fault each, on top of a plain one."""

from __future__ import annotations

import ctypes
import os
import threading
import time

from broken import BrokenPart

from ollm_conformance import ByteSourceConformance
from ollm_core import ByteSource, ReadError
from ollm_core.buffers import PAGE, round_up


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
        try:
            count = os.preadv(self.files[path], [part], offset)
        except OSError as error:
            raise ReadError(f"{path}: {error.strerror}") from error
        if count < len(part):
            raise ReadError(f"{path}: ends at byte {offset + count}")

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


BROKEN_SOURCES = [
    BrokenPart(name, fault, suite_of(source), f"byte-source.{check}")
    for name, fault, source, check in [
        ("zeros-for-errors", "A read that fails gives zeros.", ZerosForErrors, "shrunk-file"),
        ("short-read", "A read that brings too little goes unnoticed.",
         ShortReadUnnoticed, "shrunk-file"),
        ("raw-errors", "Errors of the operating system come through as they are.",
         RawErrors, "failing-storage"),
        ("off-by-a-page", "Far offsets are read a page too early.", OffByAPage, "bytes"),
        ("first-file-only", "Small tensors are read from the first file.",
         FirstFileOnly, "bytes"),
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
        ("leaves-open", "A closed source leaves a file open.", LeavesAFileOpen, "closed"),
        ("leaves-open-on-failure", "Files stay open when opening fails.",
         LeavesFilesOpenOnFailure, "open-failed"),
    ]
]  # fmt: skip

GOOD_SOURCES = [suite_of(PlainSource)]
