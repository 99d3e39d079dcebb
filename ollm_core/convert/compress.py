"""Compresses the weights of a checkpoint, losslessly, into a new directory, in the form that
`weights.formats.compressed` reads.

The original is only read. Each file gets its name when it is whole, on the disk and checked against
the original bit for bit, and config.json comes last: half a model is never opened. A conversion
that was killed goes on with the files that are missing, once those that it finds are checked in the
same way: nothing that a file says of itself is believed, for the original may be another one since.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ollm_core.checkpoint.safetensors import (
    INDEX_FILE,
    Checkpoint,
    FileState,
    check_unchanged,
    open_checkpoint,
    read_config,
    read_tensors,
)
from ollm_core.contracts.tensors import TensorInfo
from ollm_core.convert.writer import check_packed, write_packed
from ollm_core.errors import DoesNotFitError, InputError, OllmError, ReadError
from ollm_core.memory.sizes import format_size
from ollm_core.model.spec import ModelSpec, inspect_model
from ollm_core.plugins.registry import Registry
from ollm_core.weights.formats.compressed import DTYPES, FORMAT_KEY, require_zstandard

MIN_BYTES = 64 << 10
"""A smaller tensor stays as it is."""

_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_ALSO_COPIED = ("LICENSE", "NOTICE")
_CONFIG = "config.json"
_PARTIAL = ".partial"
_LIKELY = 0.66  # of a tensor's bytes: what the least random weights take
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Converting:
    """How far a conversion is. Every byte of the original counts twice: as it is written, and as
    it is checked.
    """

    file: str
    """The name of the one in work."""
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion has made. Sizes are bytes of all tensors."""

    path: Path
    original_bytes: int
    stored_bytes: int
    num_tensors: int
    """Of the original."""
    num_compressed: int
    num_files: int
    num_found: int
    """Files that an earlier run had finished."""


def convert(
    directory: Path,
    out: Path,
    *,
    min_bytes: int = MIN_BYTES,
    registry: Registry | None = None,
    on_progress: Callable[[Converting], None] | None = None,
) -> Converted:
    """Write the model of `directory` to `out` with compressed weights, or what is missing of it.

    Compressed are tensors of bfloat16 and float16 of at least `min_bytes`, in layers and routed
    experts, that are read whole and become at least a tenth smaller.

    Raises UnknownModelError, CheckpointError, ConfigError for a model that cannot be opened;
    InputError where `out` cannot be used, holds what is not made from this model as it is now, or
    there is nothing to compress; DoesNotFitError where the disk is too small; UnsupportedError
    where the package that compresses is missing; ReadError if the model changes meanwhile.
    """
    require_zstandard()
    registry = registry or Registry.discover()
    config = read_config(directory)
    checkpoint = open_checkpoint(directory)
    if any(FORMAT_KEY in metadata for metadata in checkpoint.metadata.values()):
        raise InputError(f"{directory} is already compressed", hint="use it as it is")
    inspected = functools.partial(
        inspect_model,
        registry.adapter_for(config),
        config,
        codecs=registry.offers("ollm_weight_codecs"),
        dtype="auto",
        device=torch.device("cpu"),
        where=directory,
        bare=True,
    )
    chosen = worth_trying(inspected(checkpoint=checkpoint), min_bytes)
    if not chosen:
        raise InputError(
            f"{directory}: no tensor of a layer can be compressed",
            hint=f"only {' and '.join(DTYPES)} tensors of {format_size(min_bytes)} or more are, "
            "if they are read whole",
        )
    work = _Conversion(checkpoint, out, chosen, on_progress or _ignore)
    with _errors_of(out), work.directory():
        made = work.write_weights()
        inspected(checkpoint=made)  # it can be opened
        return work.finish(made)


def worth_trying(spec: ModelSpec, min_bytes: int) -> frozenset[str]:
    """The stored tensors that are read whole by layers and experts, in a dtype and of a size that
    may pay. The embedding and stacked experts are read by row, the head in slices.
    """
    units = spec.units
    experts = (unit for layer in units.experts.values() for unit in layer)
    other = {units.embedding.name, *(t.name for unit in units.head for t in unit.tensors)}
    used = {t.name: t for unit in (*units.layers, *experts) for t in unit.tensors}
    return frozenset(
        name
        for name, info in used.items()
        if info.dtype in DTYPES
        and info.num_bytes >= max(min_bytes, 2)
        and spec.checkpoint.tensors.get(name) == info
        and name not in other
    )


class _Conversion:
    """One checkpoint and the directory that it goes to."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        out: Path,
        chosen: frozenset[str],
        on_progress: Callable[[Converting], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._chosen = chosen
        self._on_progress = on_progress
        names = _small_files(checkpoint.directory)
        self._copies = sorted(names, key=lambda name: (name == _CONFIG, name))
        small = (checkpoint.directory / name for name in self._copies)
        self._sources = {**checkpoint.files, **{p: FileState.of(p.stat()) for p in small}}
        self._files: dict[Path, list[TensorInfo]] = {path: [] for path in checkpoint.files}
        for info in checkpoint.tensors.values():
            self._files[info.path].append(info)
        self._total = 2 * checkpoint.total_bytes
        self._done = 0
        self._num_found = 0

    @contextmanager
    def directory(self) -> Iterator[None]:
        """Make `out` and keep other conversions away from it. Raises InputError where it is in
        use, or holds something else: what it has is checked.
        """
        if self._out.resolve() == self._checkpoint.directory.resolve():
            raise InputError(
                f"{self._out} is the directory of the model itself",
                hint="choose another --out",
            )
        if self._out.exists() and not self._out.is_dir():
            raise InputError(f"{self._out} is not a directory", hint="choose another --out")
        is_new = not self._out.exists()
        self._out.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._out, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{self._out}: another conversion is writing there", hint="wait for it to end"
                ) from None
            self._check_content()
            yield
        finally:
            if is_new and not any(self._out.iterdir()):
                self._out.rmdir()
            os.close(lock)

    def write_weights(self) -> Checkpoint:
        """Write the files of weights that are missing, and their index."""
        missing = [path for path in self._files if not self._target(path).exists()]
        self._num_found = len(self._files) - len(missing)
        self._check_room(missing)
        for path in missing:
            self._convert(path, self._files[path])
        stored = {path: read_tensors(self._target(path))[0] for path in self._files}
        if len(stored) > 1 or (self._checkpoint.directory / INDEX_FILE).exists():
            self._write(INDEX_FILE, _index(stored))
        return open_checkpoint(self._out)

    def finish(self, made: Checkpoint) -> Converted:
        """Copy the small files, config.json last: without it there is no model."""
        for name in self._copies:
            self._write(name, (self._checkpoint.directory / name).read_bytes())
        names = self._checkpoint.tensors.keys()
        return Converted(
            self._out,
            self._checkpoint.total_bytes,
            made.total_bytes,
            len(names),
            len(names - made.tensors.keys()),
            len(self._files),
            self._num_found,
        )

    def _convert(self, path: Path, infos: list[TensorInfo]) -> None:
        partial = self._partial(path.name)
        metadata = self._checkpoint.metadata[path]
        try:
            if infos:
                write_packed(infos, partial, metadata, self._chosen, self._report(path))
                check_packed(infos, partial, self._report(path))
            else:
                shutil.copyfile(path, partial)
            self._rename(partial, path.name)
        except OllmError:
            check_unchanged(self._sources)  # a better reason for what differs
            raise
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, name: str, content: bytes) -> None:
        partial = self._partial(name)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._rename(partial, name)
        finally:
            partial.unlink(missing_ok=True)

    def _rename(self, partial: Path, name: str) -> None:
        """Give a file its name. Raises ReadError if the original is not what it was."""
        check_unchanged(self._sources)
        partial.rename(self._out / name)
        directory = os.open(self._out, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _target(self, path: Path) -> Path:
        return self._out / path.name

    def _partial(self, name: str) -> Path:
        return self._out / f".{name}{_PARTIAL}"

    def _report(self, path: Path) -> Callable[[int], None]:
        def report(num_bytes: int) -> None:
            self._done += num_bytes
            self._on_progress(Converting(path.name, self._done, self._total))

        return report

    def _check_content(self) -> None:
        """Raises InputError if `out` holds anything that this conversion would not write."""
        weights = {path.name: path for path in self._files}
        written = {*weights, INDEX_FILE, *self._copies}
        partial = {self._partial(name).name for name in written}
        for found in self._out.iterdir():
            if found.name in partial:
                continue
            if found.name in weights:
                fits = self._is_made(found, weights[found.name])
            elif found.name in self._copies:
                original = self._checkpoint.directory / found.name
                fits = found.is_file() and found.read_bytes() == original.read_bytes()
            else:
                fits = found.name == INDEX_FILE and all((self._out / n).exists() for n in weights)
            if not fits:
                raise InputError(
                    f"{self._out} holds {found.name!a}, which is not of this conversion",
                    hint="choose an --out that is new or empty, or remove what was made from "
                    "another state of the model",
                )

    def _is_made(self, found: Path, original: Path) -> bool:
        """Whether a file holds what `original` does, bit for bit. Raises ReadError."""
        infos = self._files[original]
        if not infos:
            return filecmp.cmp(found, original, shallow=False)
        report = self._report(original)
        try:
            check_packed(infos, found, report)
        except ReadError:
            raise
        except OllmError:  # it differs, or cannot be such a file
            check_unchanged(self._sources)
            return False
        report(sum(info.num_bytes for info in infos))  # it need not be written
        return True

    def _check_room(self, missing: list[Path]) -> None:
        """Raises DoesNotFitError if the disk cannot hold what is missing, at the very best."""
        needed = 0.0
        for path in missing:
            for info in self._files[path]:
                needed += info.num_bytes * (_LIKELY if info.name in self._chosen else 1)
        free = shutil.disk_usage(self._out).free
        if needed > free:
            raise DoesNotFitError(
                f"{self._out} needs some {format_size(needed)} of disk, {format_size(free)} is "
                "free",
                hint="choose an --out on another disk",
            )


@contextmanager
def _errors_of(out: Path) -> Iterator[None]:
    """Says in one line what the system refused."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in _FULL:
            raise DoesNotFitError(
                f"{out}: {reason}",
                hint="make room and run it again: what is finished stays, and is not done again",
            ) from error
        raise InputError(f"cannot write to {out}: {reason}", hint="choose another --out") from error


def _small_files(directory: Path) -> Iterator[str]:
    """What belongs to a model beside its weights."""
    for path in directory.iterdir():
        if path.name == INDEX_FILE or path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix in _COPIED or path.name.startswith(_ALSO_COPIED):
            yield path.name


def _index(stored: Mapping[Path, Mapping[str, TensorInfo]]) -> bytes:
    weight_map = {name: path.name for path, tensors in stored.items() for name in tensors}
    total = sum(info.num_bytes for tensors in stored.values() for info in tensors.values())
    whole = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(whole, indent=1).encode()


def _ignore(_: Converting) -> None:
    pass
