"""Where each tensor of a checkpoint is: safetensors headers, read as the hostile input they are.

Knows files, names and byte ranges, but no model family. Reads no tensor data and needs no torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ollm_core.checkpoint.recognition import check_alone, no_config, no_weights
from ollm_core.contracts.tensors import DTYPE_BYTES, TensorInfo
from ollm_core.errors import CheckpointError, ConfigError, ReadError
from ollm_core.files.untrusted_json import parse_object, show

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; also put on the index."""
MAX_CONFIG_BYTES = 16 << 20

_LENGTH_BYTES = 8
_MAX_INT = (1 << 63) - 1
_FETCH_AGAIN = "fetch the model again, for instance with `ollm pull`"


@dataclass(frozen=True, slots=True)
class FileState:
    """What shows that a file was replaced or written to.

    The time of its last change, `ctime_ns`, is the one that matters: every write sets it, and no
    program can set it back, as `cp -p` and `rsync -t` do with the modification time. It also moves
    when a file gets another name, link or mode, which is then taken for a change of its content.
    """

    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state that `stat` found."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def told(self, now: FileState) -> str:
        """What is another in the state of `now`, in words."""
        pairs = {
            "size": (self.num_bytes, now.num_bytes),
            "modification time": (self.mtime_ns, now.mtime_ns),
            "change time": (self.ctime_ns, now.ctime_ns),
            "inode": (self.inode, now.inode),
        }
        return ", ".join(name for name, (before, after) in pairs.items() if before != after)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The files of one model: where each tensor is, and how the files were when opened."""

    directory: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    """By name, in the order of the files and of the bytes in them."""
    files: Mapping[Path, FileState] = field(repr=False)
    metadata: Mapping[Path, Mapping[str, str]] = field(
        default_factory=lambda: MappingProxyType({}), repr=False
    )
    """The `__metadata__` of each file."""
    index_dtype: object = None
    """`dtype` in the metadata of the index, None without one: transformers goes by it where
    config.json states no dtype. As found, so not to be relied on.
    """

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def check_unchanged(self) -> None:
        """Raises ReadError if a file is gone, or is not as it was when its header was read."""
        check_unchanged(self.files)


def check_unchanged(files: Mapping[Path, FileState]) -> None:
    """Raises ReadError if a file is gone or in another state. Takes a few microseconds for each."""
    for path, state in files.items():
        try:
            now = FileState.of(path.stat())
        except OSError as error:
            raise ReadError(
                f"{path}: cannot be read any more ({_reason(error)})",
                hint="do not move the files of a model that is open",
            ) from error
        if now != state:
            raise ReadError(
                f"{path}: changed while the model was open ({state.told(now)})",
                hint="open the model again; its files must stay as they are until it is closed",
            )


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and check the headers of the safetensors files: the single one, as transformers does
    where it is there, else those of the index.

    Raises CheckpointError, naming the file, for anything missing, damaged or contradictory.
    """
    index = directory / INDEX_FILE
    listed: dict[str, str] | None = None
    index_dtype: object = None
    if os.path.lexists(directory / SINGLE_FILE):
        names = [SINGLE_FILE]
    elif os.path.lexists(index):
        listed, index_dtype = _read_index(index)
        names = sorted(set(listed.values()))
    else:
        raise no_weights(directory, (INDEX_FILE, SINGLE_FILE))
    check_alone(directory)
    tensors: dict[str, TensorInfo] = {}
    files: dict[Path, FileState] = {}
    metadata: dict[Path, Mapping[str, str]] = {}
    for path in (directory / name for name in names):
        header, files[path] = _read_header(path)
        found, metadata[path] = _parse_header(path, header, files[path].num_bytes)
        for tensor in found:
            if other := tensors.get(tensor.name):
                raise CheckpointError(
                    f"{path}: tensor {show(tensor.name)} is also in {other.path.name}",
                    hint=_FETCH_AGAIN,
                )
            tensors[tensor.name] = tensor
    if listed is not None:
        _check_listed(index, listed, tensors)
    return Checkpoint(
        directory,
        MappingProxyType(tensors),
        MappingProxyType(files),
        MappingProxyType(metadata),
        index_dtype,
    )


def weight_files(directory: Path, name: str) -> list[str]:
    """The names of the files of weights: `name` itself, or those that it lists if it is the index,
    which must be in the directory. Raises CheckpointError.
    """
    return sorted(set(_read_index(directory / name)[0].values())) if name == INDEX_FILE else [name]


def read_tensors(path: Path) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    """The tensors of one safetensors file, in the order of their bytes, and its metadata. Raises
    CheckpointError.
    """
    header, state = _read_header(path)
    found, metadata = _parse_header(path, header, state.num_bytes)
    return MappingProxyType({tensor.name: tensor for tensor in found}), metadata


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """The model's config.json. Raises ConfigError if missing, damaged or without `model_type`."""
    path = directory / name
    if not os.path.isfile(path):
        raise no_config(path)
    try:
        config = parse_object(read_small(path, MAX_CONFIG_BYTES, ConfigError))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", hint=_FETCH_AGAIN) from error
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(
            f"{path}: `model_type` must be a string, got {show(config.get('model_type'))}",
            hint="it names the model's family, for instance `llama`",
        )
    if (named := config.get("transformers_weights")) is not None:
        raise ConfigError(
            f"{path}: `transformers_weights` must be absent, got {show(named)}",
            hint=f"name the file of the weights {SINGLE_FILE}, and remove the key",
        )
    return config


def _read_index(path: Path) -> tuple[dict[str, str], object]:
    """Tensor name to file name, and the dtype that its metadata state."""
    try:
        raw = read_small(path, MAX_HEADER_BYTES, CheckpointError)
        index = parse_object(raw, strict=True)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}", hint=_FETCH_AGAIN) from error
    listed, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            f"{path}: `weight_map` must be an object of tensor names and file names",
            hint=_FETCH_AGAIN,
        )
    for name in listed.values():
        if not _is_plain_name(name):
            raise CheckpointError(
                f"{path}: {show(name)} is not the plain name of a file in the same directory",
                hint=_FETCH_AGAIN,
            )
    return listed, metadata.get("dtype") if isinstance(metadata, dict) else None


def _check_listed(
    index: Path, listed: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    for name, file_name in listed.items():
        if name not in tensors or tensors[name].path.name != file_name:
            raise CheckpointError(
                f"{index.with_name(file_name)}: lacks tensor {show(name)}, which the index names",
                hint=_FETCH_AGAIN,
            )
    for name, tensor in tensors.items():
        if name not in listed:
            raise CheckpointError(
                f"{tensor.path}: tensor {show(name)} is not in {index.name}",
                hint="the index is of another version of the model; " + _FETCH_AGAIN,
            )


def _read_header(path: Path) -> tuple[bytes, FileState]:
    """The JSON part of a safetensors file, its length checked against the file's."""
    try:
        _check_regular(path, path.stat().st_mode, CheckpointError)
        with path.open("rb") as file:
            state = FileState.of(os.fstat(file.fileno()))
            start = file.read(_LENGTH_BYTES)
            if start == b"version ":
                raise CheckpointError(
                    f"{path}: is a Git LFS pointer, not the weights", hint="run `git lfs pull`"
                )
            length = int.from_bytes(start, "little")
            missing = _LENGTH_BYTES + length - state.num_bytes
            if len(start) == _LENGTH_BYTES and length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed",
                    hint="this is no safetensors file, or a damaged one; " + _FETCH_AGAIN,
                )
            if missing > 0:
                raise _cut_short(path, f"at least {missing}", state.num_bytes)
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error)}", hint=_FETCH_AGAIN) from error
    if len(header) < length:
        raise _cut_short(path, f"at least {length - len(header)}", state.num_bytes)
    return header, state


def _parse_header(
    path: Path, header: bytes, file_bytes: int
) -> tuple[list[TensorInfo], Mapping[str, str]]:
    """The tensors in the order of their bytes, which must reach the end of the file exactly, and
    the file's metadata.
    """
    data_start = _LENGTH_BYTES + len(header)
    try:
        if not header.startswith(b"{"):
            raise ValueError("must start with '{'")
        entries = parse_object(header, strict=True)
        metadata = entries.pop("__metadata__", {})
        _check_metadata(metadata)
        tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
        end = data_start
        for tensor in tensors:
            if tensor.offset != end:
                what = "overlaps the one before" if tensor.offset < end else "leaves a hole before"
                raise ValueError(f"tensor {show(tensor.name)} {what}")
            end += tensor.num_bytes
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged header: {error}", hint=_FETCH_AGAIN) from error
    if end > file_bytes:
        raise _cut_short(path, str(end - file_bytes), file_bytes)
    if end < file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - end} extra bytes after the last tensor", hint=_FETCH_AGAIN
        )
    return tensors, MappingProxyType(metadata)


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    """One entry of a header. Raises ValueError for one that contradicts the format."""
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {show(name)} must be an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {show(name)} has the unknown dtype {show(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise ValueError(f"tensor {show(name)} needs a shape of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(f"tensor {show(name)} needs two non-negative data_offsets")
    num_bytes = DTYPE_BYTES[dtype]
    for size in shape:
        num_bytes *= size
        if num_bytes > _MAX_INT:
            raise ValueError(f"tensor {show(name)} is larger than any file")
    begin, end = offsets
    if end - begin != num_bytes:
        raise ValueError(
            f"tensor {show(name)} has {end - begin} bytes, dtype and shape need {num_bytes}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, num_bytes)


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must be an object of strings")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT  # a bool is an int, but not a size


def _is_plain_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and value.isprintable()
        and value not in ("", ".", "..")
        and not {"/", "\\"} & set(value)
    )


def read_small(path: Path, limit: int, error_type: type[CheckpointError | ConfigError]) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `error_type`, naming it."""
    try:
        _check_regular(path, path.stat().st_mode, error_type)
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise error_type(f"{path}: {_reason(error)}", hint=_FETCH_AGAIN) from error
    if len(raw) > limit:
        raise error_type(f"{path}: larger than the {limit} bytes allowed", hint=_FETCH_AGAIN)
    return raw


def _check_regular(path: Path, mode: int, error_type: type[CheckpointError | ConfigError]) -> None:
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise error_type(f"{path}: is not a regular file", hint=_FETCH_AGAIN)


def _cut_short(path: Path, missing: str, file_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: truncated: {missing} bytes are missing after the {file_bytes} that are there",
        hint="the download was cut short; " + _FETCH_AGAIN,
    )


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
