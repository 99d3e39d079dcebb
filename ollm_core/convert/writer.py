"""Writes one safetensors file with some of its tensors compressed, and checks it bit for bit.

Knows one file; which there are and which of their tensors are worth it is for `convert` to say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ollm_core.checkpoint.safetensors import read_tensors
from ollm_core.contracts.tensors import TensorInfo
from ollm_core.errors import CheckpointError, OllmError, ReadError
from ollm_core.plugins.factories import CodecRequest
from ollm_core.weights.formats import byte_planes
from ollm_core.weights.formats.compressed import (
    FORMAT,
    FORMAT_KEY,
    compressed_weights,
    low_name,
    zstd_name,
)

WORTH = 0.9
"""A tensor stays as it is unless it takes at most this part of its bytes."""

_PIECE = 64 * byte_planes.FRAME  # bytes that are read at a time: whole frames of two-byte elements
_FAR = 10**15  # no file is larger: its digits leave room for every offset

Report = Callable[[int], None]
"""Is told how many bytes of the source were dealt with."""


def write_packed(
    tensors: Sequence[TensorInfo],
    target: Path,
    metadata: Mapping[str, str],
    chosen: Collection[str],
    report: Report,
) -> None:
    """Write `tensors`, all of one file and in its order, to `target`: those `chosen` by name
    compressed where that is worth it, the rest as they are. It is on the disk at the return.

    Holds some 50 MB, and the compressed high bytes of one tensor. Raises ReadError, OSError.
    """
    room = _header(_widest(tensors, chosen), metadata)
    room += b" " * (-(8 + len(room)) % byte_planes.ALIGNMENT)
    placed: dict[str, Any] = {}
    end = 0

    def place(name: str, dtype: str, shape: Sequence[int], num_bytes: int) -> None:
        nonlocal end
        placed[name] = _entry(dtype, shape, end, end + num_bytes)
        end += num_bytes

    with (
        target.open("wb") as file,
        tensors[0].path.open("rb") as source,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        file.write(len(room).to_bytes(8, "little") + room)
        for info in tensors:
            start = file.tell()
            count = info.num_bytes // 2
            if info.name in chosen:
                frames = list(_write_low(info, source, file, pool, report))
                parts = list(byte_planes.join_frames(frames, count))
                num_bytes = sum(map(len, parts))
                if count + num_bytes <= WORTH * info.num_bytes:
                    file.writelines(parts)
                    place(low_name(info.name, info.dtype), "U8", info.shape, count)
                    place(zstd_name(info.name, info.dtype), "U8", [num_bytes], num_bytes)
                    continue
                file.seek(start)
            for piece in _pieces(info, source):
                file.write(piece)
                report(len(piece) if info.name not in chosen else 0)
            place(info.name, info.dtype, info.shape, info.num_bytes)
        header = _header(placed, metadata)
        file.seek(8)
        file.write(header + b" " * (len(room) - len(header)))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # what is checked is then what the disk has
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_packed(tensors: Sequence[TensorInfo], packed: Path, report: Report) -> int:
    """Read `packed` as a run would, and compare each of `tensors` with what it was made from, bit
    for bit. Returns how many are compressed.

    Holds the largest tensor about twice. Raises OllmError where one differs, or `packed` is no such
    file or holds something else.
    """
    stored, metadata = read_tensors(packed)
    if FORMAT_KEY not in metadata:
        raise CheckpointError(f"{packed}: is not compressed")
    others = set(stored)
    encoded = compressed_weights(CodecRequest({}, stored, {packed: metadata}))
    with packed.open("rb") as file, tensors[0].path.open("rb") as source:
        for info in tensors:
            found = encoded.get(info.name)
            others -= {info.name} if found is None else set(found.tensors)
            if found is None:
                same = info.name in stored and _form(stored[info.name]) == _form(info)
                pieces = _pieces(stored[info.name], file) if same else iter(())
            else:
                same = (found.dtype, found.shape) == _form(info)
                parts = (_whole(stored[name], file) for name in found.tensors)
                pieces = _cut(found.decode(*parts).view(torch.uint8).numpy().reshape(-1))
            for expected in _pieces(info, source) if same else ():
                same = same and np.array_equal(next(pieces, None), expected)  # type: ignore[arg-type]
                report(len(expected))
            if not same:
                raise OllmError(
                    f"{packed}: {info.name} is not what was written",
                    hint="the disk or the memory of this machine is not to be trusted",
                )
    if others:
        raise CheckpointError(f"{packed}: holds {min(others)!a}, which the original does not")
    return len(encoded)


def _write_low(
    info: TensorInfo, source: BinaryIO, file: BinaryIO, pool: ThreadPoolExecutor, report: Report
) -> Iterator[bytes]:
    """Write the low bytes of a tensor, and give the compressed frames of the high ones."""
    for piece in _pieces(info, source):
        numbers = piece.view("<u2")
        file.write(numbers.astype(np.uint8))
        high = (numbers >> 8).astype(np.uint8)
        cuts = [high[i : i + byte_planes.FRAME] for i in range(0, len(high), byte_planes.FRAME)]
        yield from pool.map(byte_planes.compress_frame, cuts)
        report(len(piece))


def _pieces(info: TensorInfo, file: BinaryIO) -> Iterator[Any]:
    """The bytes of a tensor, in pieces [n] of bytes. Raises ReadError."""
    for begin in range(0, info.num_bytes, _PIECE):
        yield _read(info, file, begin, min(_PIECE, info.num_bytes - begin))


def _whole(info: TensorInfo, file: BinaryIO) -> torch.Tensor:
    read = _read(info, file, 0, info.num_bytes)
    return torch.from_numpy(read).view(info.shape)


def _read(info: TensorInfo, file: BinaryIO, begin: int, num_bytes: int) -> Any:
    raw = np.empty(num_bytes, np.uint8)
    try:
        file.seek(info.offset + begin)
        count = file.readinto(raw)  # type: ignore[attr-defined]
    except OSError as error:
        raise ReadError(f"{info.path}: reading failed: {error.strerror}") from error
    if count != num_bytes:
        raise ReadError(f"{info.path}: {info.name} is cut short", hint="the file has changed")
    return raw


def _cut(raw: Any) -> Iterator[Any]:
    for begin in range(0, len(raw), _PIECE):
        yield raw[begin : begin + _PIECE]


def _form(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _widest(tensors: Sequence[TensorInfo], chosen: Collection[str]) -> dict[str, Any]:
    """Entries that take at least as much room in a header as those of the file will."""
    entries = {}
    for info in tensors:
        if info.name in chosen:
            for name in (low_name(info.name, info.dtype), zstd_name(info.name, info.dtype)):
                entries[name] = _entry("U8", [*info.shape, _FAR], _FAR, _FAR)
        else:
            entries[info.name] = _entry(info.dtype, info.shape, _FAR, _FAR)
    return entries


def _entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    whole = {"__metadata__": {**metadata, FORMAT_KEY: FORMAT}, **entries}
    return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
