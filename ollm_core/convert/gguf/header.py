"""Parses the header of a GGUF file, as the hostile input that it is.

Every count and size is held against the bytes that are there before anything is made of it, so
that the libraries that read the file after this meet nothing unbounded.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from ollm_core.errors import InputError
from ollm_core.files.untrusted_json import show

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 256 << 20
_MAX_ITEMS = 1 << 20
"""Of an array: vocabularies are the largest ones."""
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 1 << 10
_MAX_FLOATS = 1 << 16
_DEFAULT_ALIGNMENT = 32
_F32 = 0
_SCALARS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9

Value = bool | int | float | str | tuple[bool | int | float | str, ...]
"""One value of the metadata."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: its shape as torch has it, and where its bytes are in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    """The number of its ggml type."""
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Of the tensor, unpacked."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """All of a GGUF file but the data of its tensors."""

    path: Path
    metadata: Mapping[str, Value] = field(repr=False)
    tensors: Mapping[str, GGUFTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """The family, as llama.cpp names it; empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def of_model(self, key: str) -> Value | None:
        """The value of `key` behind the architecture's name, for instance `block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def floats(self, name: str) -> tuple[float, ...]:
        """The elements of a small float32 tensor. Raises InputError for another one."""
        tensor = self.tensors[name]
        if tensor.kind != _F32 or tensor.num_elements > _MAX_FLOATS:
            raise InputError(f"{self.path}: {name} must be a float32 tensor of at most 65536")
        try:
            with self.path.open("rb") as file:
                raw = os.pread(file.fileno(), tensor.num_bytes, tensor.offset)
            return struct.unpack(f"<{tensor.num_elements}f", raw)
        except (OSError, struct.error) as error:
            raise InputError(f"cannot read {name} of {self.path}: {error}") from error


def check_magic(path: Path) -> None:
    """Raises InputError for a file that cannot be read, or is no GGUF at all."""
    with _opened(path):
        pass


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file. Raises InputError, in one line, for anything that is not whole."""
    with _opened(path) as file:
        return _parse(path, _Cursor(file, os.fstat(file.fileno()).st_size))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file behind its first bytes; what goes wrong with it is an InputError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise InputError(f"{path} is not a regular file")
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
            if magic != MAGIC:
                raise InputError(
                    f"{path} is not a GGUF file: it begins with {magic!r}, need {MAGIC!r}"
                )
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(
            f"{path} is truncated or damaged: {error}", hint="fetch the file again"
        ) from error


class _Cursor:
    """Reads a file from front to back, never past its end or the largest header."""

    def __init__(self, file: BinaryIO, file_bytes: int) -> None:
        self._file = file
        self.file_bytes = file_bytes
        self.position = len(MAGIC)

    def take(self, num_bytes: int) -> bytes:
        """The next bytes. Raises ValueError if they are not there."""
        if num_bytes > self.file_bytes - self.position:
            raise ValueError(f"{num_bytes} bytes at {self.position} reach past its end")
        if self.position + num_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"its header is larger than the {_MAX_HEADER_BYTES} bytes allowed")
        raw = self._file.read(num_bytes)
        if len(raw) < num_bytes:
            raise ValueError("it became shorter")
        self.position += num_bytes
        return raw

    def numbers(self, form: str, count: int = 1) -> tuple[int, ...]:
        """The next `count` numbers of one struct format."""
        return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(f"<{form}")))

    def number(self, form: str, what: str, most: int) -> int:
        """The next number. Raises ValueError if it is larger than `most`."""
        (found,) = self.numbers(form)
        if found > most:
            raise ValueError(f"{found} {what}, at most {most} are allowed")
        return found

    def text(self, most: int = _MAX_HEADER_BYTES) -> str:
        """The next string."""
        return self.take(self.number("Q", "bytes of text", most)).decode()


def _parse(path: Path, cursor: _Cursor) -> GGUFHeader:
    (version,) = cursor.numbers("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, need 2 or 3")
    num_tensors = cursor.number("Q", "tensors", _MAX_TENSORS)
    num_keys = cursor.number("Q", "keys", _MAX_KEYS)
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = cursor.text(_MAX_NAME_BYTES)
        if key in metadata:
            raise ValueError(f"key {show(key)} is there twice")
        metadata[key] = _value(cursor, key)
    found = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {show(alignment)}")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise ValueError(f"tensor {show(name)} is there twice")
        num_bytes = _num_bytes(name, shape, kind)
        if offset % alignment or start + offset + num_bytes > cursor.file_bytes:
            raise ValueError(f"tensor {show(name)} is not within the file")
        tensors[name] = GGUFTensor(name, shape, kind, start + offset, num_bytes)
    return GGUFHeader(path, MappingProxyType(metadata), MappingProxyType(tensors))


def _value(cursor: _Cursor, key: str) -> Value:
    (kind,) = cursor.numbers("I")
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.numbers(_SCALARS[kind])[0]
    if kind != _ARRAY:
        raise ValueError(f"{show(key)} has the unknown type {kind}")
    (kind,) = cursor.numbers("I")
    count = cursor.number("Q", f"items of {show(key)}", _MAX_ITEMS)
    if kind == _STRING:
        return tuple(cursor.text() for _ in range(count))
    if kind not in _SCALARS:
        raise ValueError(f"{show(key)} is an array of the unknown type {kind}")
    return cursor.numbers(_SCALARS[kind], count)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of one tensor."""
    name = cursor.text(_MAX_NAME_BYTES)
    dimensions = cursor.number("I", f"dimensions of {show(name)}", _MAX_DIMENSIONS)
    shape = cursor.numbers("Q", dimensions)[::-1]  # the file has the fastest-moving one first
    (kind,) = cursor.numbers("I")
    (offset,) = cursor.numbers("Q")
    return name, shape, kind, offset


def _num_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        raise ValueError(f"tensor {show(name)} has the unknown type {kind}") from None
    if not shape or shape[-1] % block:
        raise ValueError(f"tensor {show(name)} of shape {show(list(shape))} is not whole blocks")
    return int(prod(shape) // block * block_bytes)
