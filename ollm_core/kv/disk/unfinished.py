"""Unfinished prompts: what a pass that is broken off leaves for the next run, a file each in the
home that holds the blocks of the layers done.

A header page as the layer files have, with the sizes and checksums of the rest: first the tokens,
and the blocks of each layer done that keys and values are kept of, packed as in the journal; then
raw tensors, of which only who writes and reads them knows: recurrent states and hidden states. A
file is there when it is whole and on the disk, because it is renamed last; the next one of the same
pass takes its place. Files are hostile input.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.buffers import PAGE, as_memoryview
from ollm_core.errors import KVStoreError
from ollm_core.kv.disk.journal import (
    MAX_PAYLOAD,
    Prefix,
    checksum,
    pack_prefix,
    read_all,
    unpack_prefix,
    write_all,
)
from ollm_core.kv.disk.layer_file import (
    VERSION,
    LayerFile,
    open_own,
    read_header,
    write_header,
)

logger = logging.getLogger("ollm")

_NAME = re.compile(r"prefixes\.([0-9a-f]{32})\.unfinished", re.ASCII)
_NEW = "prefixes.unfinished.new"
_SYNC_BYTES = 64 << 20
"""Ctrl-C waits no longer than for so many to be on the disk."""
_MAX_NUMBER = 1 << 50
_MAX_LAYERS = 10_000
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Of hidden states, by the names in the files."""
_ADVISE = getattr(os, "posix_fadvise", None)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A prompt of which a pass has gone through some layers."""

    key: bytes
    """16 bytes that name the tokens and all that the bits of the pass depend on."""
    prefix: Prefix
    """All tokens, of the pass and before; of each layer done that has keys and values the blocks
    with those of the pass, the last of which may be a copy that is not full.
    """
    start: int
    """Tokens before the pass."""
    num_done: int
    """Layers of the model that are done."""
    num_layers: int
    hidden_dtype: torch.dtype
    claim_bytes: int
    """The most that the pass may come to take on disk."""
    index_bytes: int = 0
    """Of the packed prefix, behind the header."""
    tensor_bytes: int = 0
    """Of what comes after it."""
    tensor_sum: int = 0
    """The checksum of that."""

    @property
    def id(self) -> str:
        """Hex digits that name it."""
        return self.key.hex()

    @property
    def worth(self) -> int:
        """How many computed tokens it is as good as."""
        num_new = len(self.prefix.token_ids) - self.start
        return self.start + num_new * self.num_done // max(self.num_layers, 1)

    @property
    def file_bytes(self) -> int:
        """Size of its file."""
        return PAGE + self.index_bytes + self.tensor_bytes


def unfinished_path(home: Path, key: bytes) -> Path:
    """Where it lies."""
    return home / f"prefixes.{key.hex()}.unfinished"


def unfinished_files(home: Path) -> list[Path]:
    """Of a home that may be gone."""
    with suppress(OSError):
        return sorted(path for path in home.iterdir() if _NAME.fullmatch(path.name))
    return []


def remove_partial(home: Path) -> None:
    """Remove what a process was writing when it was killed. For who owns the home."""
    with suppress(OSError):
        (home / _NEW).unlink()


def read_unfinished(path: Path) -> tuple[dict[str, Any], Unfinished]:
    """What the header says of the model, and the rest; the tensors are not looked at. Raises
    OSError or KVStoreError.
    """
    file = open_own(path, os.O_RDONLY)
    try:
        fields = read_header(_exactly(file, PAGE, 0, path), path)
        about = fields.pop("pass", None)
        size = os.fstat(file).st_size
        try:
            name = _NAME.fullmatch(path.name)
            found = _numbers(about if isinstance(about, dict) else {})
            dtype = DTYPES[about["dtype"]] if isinstance(about, dict) else torch.float32
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path) from error
        start, done, layers, claim, index_bytes, index_sum, tensor_bytes, tensor_sum = found
        if (
            name is None
            or PAGE + index_bytes + tensor_bytes != size
            or index_bytes > MAX_PAYLOAD
            or not done <= layers <= _MAX_LAYERS
        ):
            raise _damaged(path)
        index = _exactly(file, index_bytes, PAGE, path)
        prefix = unpack_prefix(index) if checksum(index) == index_sum else None
        if prefix is None or len(prefix.layers) > done or start >= len(prefix.token_ids):
            raise _damaged(path)
    finally:
        os.close(file)
    key = bytes.fromhex(name[1])
    sizes = index_bytes, tensor_bytes, tensor_sum
    return fields, Unfinished(key, prefix, start, done, layers, dtype, claim, *sizes)


def sound_unfinished(
    directory: Path,
    fields: Mapping[str, Any],
    prefixes: Sequence[Prefix],
    files: Sequence[LayerFile],
    geometry: KVGeometry,
) -> list[Unfinished]:
    """Those in a home that is owned here which can be gone on with; any others are removed."""
    contents = {
        (layer_idx, block): content
        for prefix in prefixes
        for layer_idx, layer in enumerate(prefix.layers)
        for block, content in zip(layer.blocks, layer.checksums, strict=True)
    }
    sound = []
    for path in unfinished_files(directory):
        with suppress(OSError, KVStoreError):
            found, one = read_unfinished(path)
            mine = {
                (layer_idx, block): content
                for layer_idx, layer in enumerate(one.prefix.layers)
                for block, content in zip(layer.blocks, layer.checksums, strict=True)
            }
            if (
                found == {"version": VERSION, **fields}
                and _can_go_on(one, files, geometry)
                and all(contents.get(key, content) == content for key, content in mine.items())
            ):
                contents |= dict.fromkeys(mine, -1)  # no two have one block
                sound.append(one)
                continue
        logger.info("%s: the unfinished prompt cannot be gone on with, and is removed", path)
        with suppress(OSError):
            path.unlink()
    return sound


def write_unfinished(
    home: Path,
    fields: Mapping[str, Any],
    one: Unfinished,
    tensors: Iterable[Tensor],
    staging: Tensor,
) -> Unfinished:
    """Write it to the disk, in place of what has its key; `fields` say what model it is of. Returns
    it with its sizes and checksum. `tensors` go through the uint8 host buffer `staging`. For who
    owns the home. Raises OSError; what was there is then as it was.
    """
    index = pack_prefix(one.prefix)
    path = home / _NEW
    remove_partial(home)
    file = open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        write_all(file, write_header({}), 0)  # first: whoever finds it knows it for ours
        end = write_all(file, index, PAGE)
        hashed, begin, synced = xxhash.xxh3_64(), end, end
        for piece in _pieces(tensors, staging):
            hashed.update(piece)
            end = write_all(file, piece, end)
            if end - synced > _SYNC_BYTES:
                os.fdatasync(file)
                synced = end
        written = replace(
            one,
            index_bytes=len(index),
            tensor_bytes=end - begin,
            tensor_sum=hashed.intdigest(),
        )
        write_all(file, write_header({**fields, "pass": _told(written, checksum(index))}), 0)
        os.fsync(file)
        if _ADVISE:  # it is as large as the prompt, and not read again soon
            _ADVISE(file, 0, 0, os.POSIX_FADV_DONTNEED)
        path.replace(unfinished_path(home, one.key))
    except BaseException:
        remove_partial(home)
        raise
    finally:
        os.close(file)
    with suppress(OSError):
        _sync_directory(home)
    return written


def fill_tensors(home: Path, one: Unfinished, tensors: Iterable[Tensor], staging: Tensor) -> None:
    """Fill `tensors`, which are as those that were written, through `staging`: each before the next
    one is asked for. Raises OSError, EOFError or KVStoreError.
    """
    file = open_own(unfinished_path(home, one.key), os.O_RDONLY)
    try:
        begin, buffer = PAGE + one.index_bytes, as_memoryview(staging)
        for tensor in tensors:
            for part in raw(tensor).split(len(staging)):
                for done, count in _read_pieces(file, buffer[: len(part)], begin):
                    part[done : done + count].copy_(staging[done : done + count])
                begin += len(part)
    finally:
        os.close(file)


def is_whole(home: Path, one: Unfinished, staging: Tensor) -> bool:
    """Whether its tensors are what was written. Raises OSError, EOFError or KVStoreError."""
    path, buffer = unfinished_path(home, one.key), as_memoryview(staging)
    file = open_own(path, os.O_RDONLY)
    try:
        hashed, begin, end = xxhash.xxh3_64(), PAGE + one.index_bytes, one.file_bytes
        while begin < end:
            piece = buffer[: min(end - begin, len(buffer))]
            for done, count in _read_pieces(file, piece, begin):
                hashed.update(piece[done : done + count])
            begin += len(piece)
        return hashed.intdigest() == one.tensor_sum
    finally:
        os.close(file)


def _can_go_on(one: Unfinished, files: Sequence[LayerFile], geometry: KVGeometry) -> bool:
    """Whether every layer done has the blocks with the tokens of the pass, in its file."""
    num_tokens, first = len(one.prefix.token_ids), one.start // geometry.block_size
    total = -(-num_tokens // geometry.block_size)
    return (
        one.num_done > 0
        and num_tokens - one.start > geometry.block_size
        and min(one.prefix.token_ids) >= 0
        and len(one.prefix.layers) <= geometry.num_layers
        and all(
            first <= layer.first
            and layer.first + len(layer.blocks) == total
            and len(set(layer.blocks)) == len(layer.blocks)
            and max(layer.blocks, default=-1) < file.num_slots
            and layer.first * geometry.block_size
            <= max(geometry.first_needed(layer_idx, num_tokens), first * geometry.block_size)
            for layer_idx, (layer, file) in enumerate(zip(one.prefix.layers, files, strict=False))
        )
    )


def _pieces(tensors: Iterable[Tensor], staging: Tensor) -> Iterator[memoryview]:
    """Their bytes in order, each valid until the next step."""
    buffer = as_memoryview(staging)
    for tensor in tensors:
        for part in raw(tensor).split(len(staging)):
            staging[: len(part)].copy_(part)
            yield buffer[: len(part)]


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 [n]; a view."""
    return tensor.detach().view(-1).view(torch.uint8)


def _read_pieces(file: int, buffer: memoryview, offset: int) -> Iterator[tuple[int, int]]:
    """Fill `buffer`; -> where in it each part is that has come, and how long. Raises EOFError."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if not count:
            raise EOFError
        yield done, count
        done += count


def _told(one: Unfinished, index_sum: int) -> dict[str, object]:
    return {
        "start": one.start,
        "done": one.num_done,
        "layers": one.num_layers,
        "dtype": str(one.hidden_dtype).removeprefix("torch."),
        "claim": one.claim_bytes,
        "index": [one.index_bytes, index_sum],
        "tensors": [one.tensor_bytes, one.tensor_sum],
    }


def _numbers(about: Mapping[str, Any]) -> tuple[int, ...]:
    """Start, layers done, layers, claim, then bytes and checksum of both parts. Raises KeyError,
    TypeError or ValueError.
    """
    (index_bytes, index_sum), (tensor_bytes, tensor_sum) = about["index"], about["tensors"]
    small = about["start"], about["done"], about["layers"], about["claim"], index_bytes
    found = *small, index_sum, tensor_bytes, tensor_sum
    for number, most in zip(
        found, (*[_MAX_NUMBER] * 5, 1 << 64, _MAX_NUMBER, 1 << 64), strict=True
    ):
        if type(number) is not int or not 0 <= number < most:
            raise ValueError("not a number that can be")
    return found


def _exactly(file: int, num_bytes: int, offset: int, path: Path) -> bytes:
    try:
        return read_all(file, num_bytes, offset)
    except EOFError as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> KVStoreError:
    return KVStoreError(f"{path}: the unfinished prompt is damaged")


def _sync_directory(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def as_bytes(tensor: Tensor) -> bytes:
    """Those of a small contiguous tensor."""
    found: bytes = raw(tensor).cpu().numpy().tobytes()
    return found
