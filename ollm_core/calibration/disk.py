"""Measures how fast each reading engine reads the models directory, with a cold cache."""

from __future__ import annotations

import errno
import os
import time
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

from ollm_core.contracts.tensors import TensorInfo
from ollm_core.contracts.weights import ByteSource
from ollm_core.device.buffers import aligned_buffer, as_memoryview
from ollm_core.errors import InputError, OllmError
from ollm_core.files.scratch import leftovers, make_file, reap
from ollm_core.weights.sources.posix import READERS, open_source

_PIECE_BYTES = 32 << 20
_NUM_BUFFERS = 4  # more than a processor's cache holds, as the buffers of a run are
_READ_BYTES = 2 << 30
_READ_SECONDS = 3.0
_TRIAL = "ollm-doctor-"
_TRIAL_BYTES = 512 << 20
_LEAST_FILE_BYTES = 256 << 20


def measure_readers(directory: Path) -> dict[str, float]:
    """Bytes per second of each engine that works in `directory`, which is there.

    Reads the largest model file, or one that is made for it and removed. Raises InputError if there
    is none and none can be made, and what the first engine raises if none works.
    """
    files = [(path.stat().st_size, path) for path in directory.glob("*/*.safetensors")]
    files += [(path.stat().st_size, path) for path in directory.glob("*.safetensors")]
    num_bytes, largest = max(files, default=(0, directory))
    if num_bytes >= _LEAST_FILE_BYTES:
        return _rates(largest)
    reap(leftovers(directory, _TRIAL))
    try:
        with ExitStack() as stack:
            trial = make_file(directory, _TRIAL)
            stack.callback(os.close, trial.descriptor)
            stack.callback(trial.path.unlink)
            block = os.urandom(1 << 20)
            for _ in range(_TRIAL_BYTES // len(block)):
                if os.write(trial.descriptor, block) < len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(trial.descriptor)
            return _rates(trial.path)
    except OSError as error:
        raise InputError(
            f"{directory}: no large model file is there to read, and none can be made: "
            f"{error.strerror}",
            hint="name another directory with --models-dir",
        ) from error


def _rates(path: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    refused: OllmError | None = None
    for name in READERS:
        try:
            with open_source([path], name) as source:
                found[name] = _rate(source, path)
        except OllmError as error:  # the file system refuses it, or its library is not here
            refused = refused or error
    if refused and not found:
        raise refused
    return found


def _rate(source: ByteSource, path: Path) -> float:
    size = path.stat().st_size
    pieces = [
        TensorInfo(f"{begin}", "U8", (count,), path, begin, count)
        for begin in range(0, size, _PIECE_BYTES)
        if (count := min(_PIECE_BYTES, size - begin))
    ]
    most = max(source.buffer_bytes([piece]) for piece in pieces)
    buffers = [aligned_buffer(most) for _ in range(_NUM_BUFFERS)]
    for buffer in buffers:
        buffer.fill_(0)  # takes its pages from the machine
    _drop_from_cache(path)
    done, start, seconds = 0, time.perf_counter(), 0.0
    for piece, buffer in zip(pieces, cycle(buffers), strict=False):
        source.read([piece], as_memoryview(buffer))
        done += piece.num_bytes
        seconds = time.perf_counter() - start
        if done >= _READ_BYTES or seconds >= _READ_SECONDS:
            break
    return done / max(seconds, 1e-9)


def _drop_from_cache(path: Path) -> None:
    """So that what is measured is the disk, where the system can be asked for it."""
    if not hasattr(os, "posix_fadvise"):
        return
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
