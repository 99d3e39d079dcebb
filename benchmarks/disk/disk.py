"""The disk's own limit: how fast one thread can read given files with nothing else to do.

usage: disk.py CHECKPOINT [--bytes 4GB] [--block 16MiB] [--rounds 3]

One thread calls `preadv` with O_DIRECT into one reused buffer on huge pages, block by block, over
the model's own files. Where the file system refuses O_DIRECT the reads go through the page cache,
which is dropped first, and the result says so.
"""

from __future__ import annotations

import argparse
import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from benchmarks.tools.measure import checkpoint_files, drop_from_cache
from ollm_core.device.buffers import PAGE, aligned_buffer, as_memoryview, round_up
from ollm_core.memory.sizes import parse_size


@dataclass(frozen=True, slots=True)
class DiskRate:
    """What one probe saw. GB is 10**9 bytes."""

    num_bytes: int
    seconds: float
    cpu_seconds: float
    direct: bool
    """Read with O_DIRECT."""

    @property
    def gb_per_second(self) -> float:
        return self.num_bytes / self.seconds / 1e9


def probe(
    files: Sequence[Path],
    total_bytes: int | None = None,
    block_bytes: int = 16 << 20,
    num_blocks: int = 1,
) -> DiskRate:
    """Read `total_bytes` (default: each file once) of `files`, in order and over again, cold.

    One block, read into over and over, stays in the processor's cache: the most that any reader
    can get. With as many blocks as a ring of layers takes, it is what a streaming reader can get.
    """
    total_bytes = total_bytes or sum(path.stat().st_size for path in files)
    buffer = aligned_buffer(num_blocks * round_up(block_bytes, PAGE))
    buffer.fill_(0)  # take the pages now, not while the clock runs
    memory = as_memoryview(buffer)
    blocks = cycle([memory[i * block_bytes : (i + 1) * block_bytes] for i in range(num_blocks)])
    direct = all(_takes_direct(path, memory[:PAGE]) for path in files)
    drop_from_cache(files)
    done, started, cpu_started = 0, time.perf_counter(), time.thread_time()
    while done < total_bytes:
        for num_bytes in _reads(files, blocks, direct):
            done += num_bytes
            if done >= total_bytes:
                break
    return DiskRate(done, time.perf_counter() - started, time.thread_time() - cpu_started, direct)


def _reads(files: Sequence[Path], blocks: Iterator[memoryview], direct: bool) -> Iterator[int]:
    """Bytes read by each `preadv` of one walk over `files`; a file's last block may be short."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            size, offset = os.fstat(descriptor).st_size, 0
            while offset < size:
                num_bytes = os.preadv(descriptor, [next(blocks)], offset)
                if not num_bytes:
                    raise OSError(errno.EIO, "file became shorter while it was read", str(path))
                yield num_bytes
                offset += num_bytes
        finally:
            os.close(descriptor)


def _takes_direct(path: Path, page: memoryview) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        os.preadv(descriptor, [page], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the disk's own limit on a model's files.")
    parser.add_argument("checkpoint", type=Path, help="directory with *.safetensors")
    parser.add_argument("--bytes", type=parse_size, help="how much to read (default: all, once)")
    parser.add_argument("--block", type=parse_size, default=16 << 20, help="default: 16MiB")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    files = checkpoint_files(args.checkpoint)
    for _ in range(args.rounds):
        rate = probe(files, args.bytes, args.block)
        print(
            f"{rate.gb_per_second:.2f} GB/s, {rate.num_bytes / 1e9:.2f} GB, "
            f"{rate.cpu_seconds / (rate.num_bytes / 1e9):.3f} CPU s/GB, "
            f"{'O_DIRECT' if rate.direct else 'page cache'}"
        )


if __name__ == "__main__":
    main()
