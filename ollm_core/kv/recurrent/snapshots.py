"""Snapshots of recurrent states on disk: a file each, named by the tokens before it and the dtype.

A header page as the layer files have, with a checksum of the rest: the states of all layers, raw
and little-endian, in layer order. A file is there when it is whole, because it is renamed last, and
is never written again. Files are hostile input.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.buffers import PAGE, aligned_buffer, as_memoryview
from ollm_core.errors import KVStoreError
from ollm_core.files.paths import is_private
from ollm_core.files.scratch import leftovers, make_file, reap
from ollm_core.kv.disk.layer_file import header_fields, open_own, read_header, write_header

_PREFIX = "ollm-states-"
_NEW = "new-"
_STATE = re.compile(r"([1-9]\d{0,8})-([0-9a-f]{32})-(\w+)\.state", re.ASCII)
_PIECE = 16 << 20

logger = logging.getLogger("ollm")


@dataclass(frozen=True, slots=True)
class StoredState:
    """A file with a state, as its name tells."""

    path: Path
    fingerprint: str
    dtype: str
    num_tokens: int
    key: str
    """32 hex digits that name the tokens before it."""
    num_bytes: int
    seconds: int
    """When it was written, since 1970."""

    def is_of(self, token_ids: Tensor) -> bool:
        """Whether `token_ids` [T] begin with the tokens before it."""
        return len(token_ids) >= self.num_tokens and _key(token_ids[: self.num_tokens]) == self.key


class StateWriter:
    """One file that is being written, layer by layer, in any order."""

    def __init__(self, files: StateFiles, num_tokens: int) -> None:
        """Raises OSError."""
        self.num_tokens = num_tokens
        self._files = files
        self._left = set(files.offsets)
        self._checksums: dict[int, int] = {}
        scratch = make_file(files.directory, _NEW)
        self._file, self._path = scratch.descriptor, scratch.path

    def write(self, layer_idx: int, state: Sequence[Tensor]) -> None:
        """Write the state of one layer. Raises OSError."""
        data = b"".join(_bytes(value) for value in state)
        _write_all(self._file, data, PAGE + self._files.offsets[layer_idx])
        self._checksums[layer_idx] = xxhash.xxh3_64_intdigest(data)
        self._left.discard(layer_idx)

    def finish(self, token_ids: Tensor) -> None:
        """Make it one that is found, if all layers are there. Raises OSError."""
        if not self._left:
            fields = self._files.fields(token_ids)
            sums = [self._checksums[layer_idx] for layer_idx in self._files.offsets]
            _write_all(self._file, write_header({**fields, "checksum": _joined(sums)}), 0)
            os.replace(self._path, self._files.path(token_ids))
        self.drop()

    def drop(self) -> None:
        """Stop. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with suppress(OSError):
                self._path.unlink()


class StateFiles:
    """The files of one model in one directory."""

    def __init__(self, parent: Path, geometry: KVGeometry, fingerprint: str) -> None:
        """Make the directory, for this user only. Raises OSError; KVStoreError if another user has
        it.
        """
        self.directory = parent / f"{_PREFIX}{fingerprint}"
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_private(self.directory.lstat()):
            raise KVStoreError(f"{self.directory}: not a private directory of this user")
        self._geometry = geometry
        self._fingerprint = fingerprint
        layers = [i for i, kind in enumerate(geometry.kinds) if kind.states]
        ends = list(itertools.accumulate(map(geometry.state_bytes, layers)))
        self.offsets: Mapping[int, int] = dict(zip(layers, [0, *ends], strict=False))
        """Where each layer's state begins behind the header."""
        self._num_bytes = ends[-1]
        self.file_bytes = PAGE + ends[-1]
        """Of one file."""

    def find(self, token_ids: Tensor, longest: int) -> Iterator[int]:
        """Numbers of tokens, at most `longest`, after which there is a state of these [T]; the
        largest first.
        """
        found = []
        for path in _state_files(self.directory):
            num_tokens = _num_tokens(path)
            if 0 < num_tokens <= longest and path == self.path(token_ids[:num_tokens]):
                found.append(num_tokens)
        yield from sorted(found, reverse=True)

    def has(self, token_ids: Tensor) -> bool:
        """Whether there is one for just these tokens."""
        return self.path(token_ids).exists()

    def read(self, token_ids: Tensor) -> dict[int, list[Tensor]] | None:
        """The state of each layer after just these tokens, or None, the file being removed, if it
        is not what was written.
        """
        path = self.path(token_ids)
        try:
            return self._read(path, token_ids)
        except (OSError, KVStoreError) as error:
            logger.warning("a saved recurrent state cannot be used: %s", error)
            with suppress(OSError):
                path.unlink()
            return None

    def fields(self, token_ids: Tensor) -> dict[str, object]:
        """What the header of the file for these tokens says, besides the checksum."""
        return {
            **header_fields(self._geometry, self._fingerprint),
            "tokens": _key(token_ids),
            "layers": [self._geometry.state_bytes(layer_idx) for layer_idx in self.offsets],
        }

    def path(self, token_ids: Tensor) -> Path:
        """Where the state after these tokens is, if it is. A run in another dtype has its own."""
        dtype = str(self._geometry.dtype).removeprefix("torch.")
        return self.directory / f"{len(token_ids)}-{_key(token_ids)}-{dtype}.state"

    def _read(self, path: Path, token_ids: Tensor) -> dict[int, list[Tensor]]:
        file = open_own(path, os.O_RDONLY)
        try:
            header = read_header(os.pread(file, PAGE, 0), path)
            whole = aligned_buffer(self._num_bytes)
            buffer = as_memoryview(whole)
            done = 0
            while done < len(buffer) and (count := os.preadv(file, [buffer[done:]], PAGE + done)):
                done += count
        finally:
            os.close(file)
        states: dict[int, list[Tensor]] = {}
        sums = []
        for layer_idx, begin in self.offsets.items():
            states[layer_idx], end = [], begin
            for shape, dtype in self._geometry.state_shapes(layer_idx):
                size = torch.Size(shape).numel() * dtype.itemsize
                states[layer_idx].append(whole[end : end + size].view(dtype).view(shape))
                end += size
            sums.append(xxhash.xxh3_64_intdigest(buffer[begin:end]))
        if header != {"version": header["version"], **self.fields(token_ids)} | {
            "checksum": _joined(sums)
        }:
            raise KVStoreError(f"{path}: not what was written")
        return states


def remove_states(
    parent: Path, fingerprint: str, gone: Sequence[Tensor], kept: Sequence[Tensor]
) -> None:
    """Remove the states of the tokens that `gone` begin with, unless one of `kept` does too."""
    directory = parent / f"{_PREFIX}{fingerprint}"
    for path in _state_files(directory):
        num_tokens = _num_tokens(path)

        def leads_to(token_ids: Tensor, path: Path = path, num_tokens: int = num_tokens) -> bool:
            beginning = token_ids[:num_tokens]
            return len(beginning) == num_tokens and _key(beginning) in path.name

        if any(map(leads_to, gone)) and not any(map(leads_to, kept)):
            with suppress(OSError):
                path.unlink()
    with suppress(OSError):
        directory.rmdir()


def list_states(parent: Path) -> tuple[list[StoredState], list[str]]:
    """The states that are kept in `parent`, of any model, and one line for each thing that only has
    a name of ours. Links are not followed.
    """
    found, remarks = [], []
    for directory in sorted(parent.glob(f"{_PREFIX}*")):
        with suppress(OSError):
            if not is_private(directory.lstat()):
                remarks.append(f"{directory}: a link or not private to this user, left alone")
                continue
            for path in sorted(directory.iterdir()):
                about, name = path.lstat(), _STATE.fullmatch(path.name)
                if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
                    remarks.append(f"{path}: not a file of ollm")
                elif name:
                    fingerprint = directory.name.removeprefix(_PREFIX)
                    known = fingerprint, name[3], int(name[1]), name[2]
                    found.append(StoredState(path, *known, about.st_size, int(about.st_mtime)))
                elif not path.name.startswith(_NEW):
                    remarks.append(f"{path}: not a file of ollm")
    return found, remarks


def verify_state(state: StoredState) -> str:
    """What is wrong with it, or "" if it is what was written."""
    try:
        file = open_own(state.path, os.O_RDONLY)
    except FileNotFoundError:  # somebody has removed it since it was listed
        return ""
    except (OSError, KVStoreError) as error:
        return str(error)
    try:
        fields = read_header(os.pread(file, PAGE, 0), state.path)
        sizes = fields.get("layers")
        size = os.fstat(file).st_size - PAGE
        if not (isinstance(sizes, list) and all(isinstance(one, int) for one in sizes)):
            return f"{state.path}: the header of the KV file is damaged"
        if min(sizes, default=0) < 0 or sum(sizes) != size:
            return f"{state.path}: need {sum(sizes)} bytes of states, have {size}"
        offset, sums = PAGE, []
        for num_bytes in sizes:
            sums.append(_sum_of(file, offset, num_bytes))
            offset += num_bytes
        named = state.fingerprint, state.dtype, state.key
        if named != tuple(fields.get(name) for name in ("fingerprint", "dtype", "tokens")):
            return f"{state.path}: is named for other tokens or another model"
        if fields.get("checksum") != _joined(sums):
            return f"{state.path}: not what was written"
    except (OSError, KVStoreError) as error:
        return str(error)
    finally:
        os.close(file)
    return ""


def reap_states(parent: Path) -> None:
    """Remove what killed processes were writing in `parent`, whatever the model."""
    with suppress(OSError):
        for directory in parent.glob(f"{_PREFIX}*"):
            if is_private(directory.lstat()):
                reap(leftovers(directory, _NEW))


def _state_files(directory: Path) -> list[Path]:
    return list(directory.glob("*-*.state"))


def _num_tokens(path: Path) -> int:
    first = path.name.partition("-")[0]
    return int(first) if first.isascii() and first.isdigit() and len(first) < 10 else 0


def _key(token_ids: Tensor) -> str:
    """32 hex digits that name the tokens."""
    return hashlib.sha256(_bytes(token_ids.to(torch.int32))).hexdigest()[:32]


def _bytes(value: Tensor) -> bytes:
    raw: bytes = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return raw


def _sum_of(file: int, offset: int, num_bytes: int) -> int:
    """The checksum of bytes of a file; those that are missing at its end count as not there."""
    hashed = xxhash.xxh3_64()
    while num_bytes and (part := os.pread(file, min(num_bytes, _PIECE), offset)):
        hashed.update(part)
        offset, num_bytes = offset + len(part), num_bytes - len(part)
    return hashed.intdigest()


def _joined(sums: Sequence[int]) -> int:
    return xxhash.xxh3_64_intdigest(b"".join(one.to_bytes(8, "little") for one in sums))


def _write_all(file: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count
