"""The fingerprint of a model: a hash of its config and of every byte of its files, computed once.

A file's hash is SHA-256, so that no file can be made to pass for another one: over the SHA-256 of
each piece of 4 MiB, so that several threads can work at it. Reading and hashing takes 0.63 CPU
seconds per GB with the SHA instructions of a CPU (AMD EPYC): two free cores keep up with an NVMe
disk. It reads past the page cache where the file system allows it, and so evicts nothing from
there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from ollm_core.checkpoint.safetensors import Checkpoint, FileState
from ollm_core.contracts.model import Config
from ollm_core.contracts.tensors import TensorInfo
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.buffers import aligned_buffer, as_memoryview
from ollm_core.files.paths import cache_directory
from ollm_core.files.remembered import Remembered
from ollm_core.weights.sources.posix import open_source

_PIECE_BYTES = 4 << 20
_MOST_THREADS = 4
_SCHEME = "ollm 1"
"""Another way of hashing gets another name."""
_REMEMBERED_BYTES = 16 << 20
"""A smaller file is hashed again, in some milliseconds."""
_SETTLED_NS = 2_000_000_000
"""A file that was changed more recently could be changed again within the same tick of its file
system's clock, which nothing would show.
"""
_MOST_ENTRIES = 4096
_DIGEST = re.compile("[0-9a-f]{64}")

Report = Callable[[int, int], None]
"""Is told how many bytes are hashed, of how many, before the first piece and after each."""

logger = logging.getLogger("ollm")


class FileHashes:
    """Hashes of files, remembered for this user from one process to the next.

    An entry is found under a file's real path, size, inode and times: a file that was changed or
    replaced is another file. What another user may have written is not believed, and what cannot
    be kept is computed again the next time.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        least_bytes: int = _REMEMBERED_BYTES,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """`path` is where they are kept, below `cache_directory` by default. Files smaller than
        `least_bytes` are not remembered. `clock` is that of the file system, in nanoseconds.
        """
        self.clock = clock
        path = path or cache_directory() / "identity" / "hashes.json"
        self._known = Remembered(path, _is_digest, _MOST_ENTRIES)
        self._least_bytes = least_bytes

    def find(self, files: Mapping[Path, FileState]) -> dict[Path, str]:
        """The hashes that are known of `files`, 64 hex digits each."""
        known = self._known.read()
        keys = {path: _key(path, state) for path, state in files.items()}
        return {path: known[key] for path, key in keys.items() if key in known}

    def add(
        self, hashes: Mapping[Path, str], files: Mapping[Path, FileState], started_ns: int
    ) -> None:
        """Remember `hashes` of files in these states, read from the time `started_ns` on."""
        new = {
            _key(path, files[path]): digest
            for path, digest in hashes.items()
            if files[path].num_bytes >= self._least_bytes
            and started_ns - max(files[path].mtime_ns, files[path].ctime_ns) > _SETTLED_NS
        }
        if not new:
            return
        try:
            self._known.add(new)
        except OSError as error:
            reason = error.strerror or error
            where = self._known.path.parent
            logger.warning("%s: hashes cannot be kept there: %s", where, reason)


def identity(
    checkpoint: Checkpoint,
    config: Config,
    report: Report | None = None,
    hashes: FileHashes | None = None,
    *,
    exact: bool = False,
) -> str:
    """64 hex digits that name a model by its content: those of its config as parsed, and of each of
    its files as it was when the checkpoint was opened. Others if it is `exact`: what another
    attention gave has other last bits.

    Reads what `hashes` (default: this user's) does not know, and holds 16 MiB or less for it. Says
    nothing to `report` where nothing is read. Raises ReadError if a file cannot be read or is not
    as it was.
    """
    files = checkpoint.files
    hashes = hashes or FileHashes()
    known = hashes.find(files)
    missing = [path for path in files if path not in known]
    if missing:
        started_ns = hashes.clock()
        new = _hash_files({path: files[path].num_bytes for path in missing}, report)
        checkpoint.check_unchanged()
        hashes.add(new, files, started_ns)
        known |= new
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=str).encode())
    for path in sorted(files, key=lambda path: path.name):
        digest.update(bytes.fromhex(known[path]))
    if exact:
        digest.update(b"exact")
    return digest.hexdigest()


def _hash_files(sizes: Mapping[Path, int], report: Report | None) -> dict[Path, str]:
    """The hash of each file of so many bytes. Raises ReadError."""
    found: dict[Path, str] = {}
    total, done = sum(sizes.values()), 0
    with ExitStack() as opened:
        source = opened.enter_context(closing(open_source(list(sizes))))
        pieces = _Pieces(source)
        opened.callback(pieces.close)
        if report:
            report(0, total)
        for path, num_bytes in sizes.items():
            digest = hashlib.sha256(f"{_SCHEME} {num_bytes} ".encode())
            for piece_bytes, piece_digest in pieces.of(path, num_bytes):
                digest.update(piece_digest)
                done += piece_bytes
                if report:
                    report(done, total)
            found[path] = digest.hexdigest()
    return found


class _Pieces:
    """Reads and hashes pieces of files in a few threads, a buffer each."""

    def __init__(self, source: ByteSource) -> None:
        num_threads = min(_MOST_THREADS, os.cpu_count() or 1)
        self._source = source
        self._pool = ThreadPoolExecutor(num_threads, "ollm-hash")
        self._ahead = 2 * num_threads
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._memory = [aligned_buffer(_PIECE_BYTES) for _ in range(num_threads)]
        for memory in self._memory:
            self._buffers.put(as_memoryview(memory))

    def of(self, path: Path, num_bytes: int) -> Iterator[tuple[int, bytes]]:
        """The size and the SHA-256 of each piece of a file, in order. Raises ReadError."""
        pending: deque[tuple[int, Future[bytes]]] = deque()
        for offset in range(0, num_bytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, num_bytes - offset)
            piece = TensorInfo(f"bytes from {offset}", "U8", (size,), path, offset, size)
            pending.append((size, self._pool.submit(self._digest, piece)))
            if len(pending) == self._ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for size, future in pending:
            yield size, future.result()

    def close(self) -> None:
        """Start no more of them, and wait for those that are being hashed."""
        self._pool.shutdown(cancel_futures=True)

    def _digest(self, piece: TensorInfo) -> bytes:
        buffer = self._buffers.get()
        try:
            (offset,) = self._source.read([piece], buffer)
            return hashlib.sha256(buffer[offset : offset + piece.num_bytes]).digest()
        finally:
            self._buffers.put(buffer)


def _key(path: Path, state: FileState) -> str:
    """What a file in a state is remembered under."""
    told = f"{_SCHEME} {state.num_bytes} {state.mtime_ns} {state.ctime_ns} {state.inode} "
    return hashlib.sha256(told.encode() + os.fsencode(os.path.realpath(path))).hexdigest()


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None
