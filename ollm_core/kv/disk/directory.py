"""A KV store's directory: its lock, its layer files and, with a prefix cache, the journal.

One process owns a directory, by flock on it, for as long as it is open. Any number may read what is
kept there, see `readers`; anybody may read a journal.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ollm_core.contracts.closing import Closing
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.buffers import PAGE
from ollm_core.errors import InputError, KVStoreError
from ollm_core.files.paths import cache_directory, check_writable_directory, is_private, retrying
from ollm_core.files.scratch import Scratch, make_directory, reap, take_over
from ollm_core.kv.disk import marks, readers
from ollm_core.kv.disk.compaction import compact
from ollm_core.kv.disk.journal import NAME, Journal, Prefix, read_journal
from ollm_core.kv.disk.layer_file import (
    MAGIC,
    LayerFile,
    header_fields,
    open_own,
    storage_error,
)
from ollm_core.kv.disk.unfinished import (
    Unfinished,
    read_unfinished,
    remove_partial,
    sound_unfinished,
    unfinished_files,
    unfinished_path,
)

PREFIX = "ollm-kv-"

_ELSEWHERE = "name a directory for KV that can be written"

logger = logging.getLogger("ollm")


class KVDirectory(Closing):
    """A directory that this process owns. Closing it removes it, unless it has `prefixes`, or
    something `unfinished`.
    """

    def __init__(self, directory: Path, lock: int, files: Sequence[LayerFile]) -> None:
        """Made by `make_home` and `open_home`."""
        self.directory = directory
        self.files = files
        """One per layer."""
        self.journal: Journal | None = None
        """None if nothing is to be kept."""
        self.prefixes: list[Prefix] = []
        """What is kept, oldest first."""
        self.unfinished: list[Unfinished] = []
        """Prompts that can be gone on with."""
        self._lock = lock

    def keep(self, prefix: Prefix) -> None:
        """Keep a prefix whose blocks are written. Raises OSError with nothing changed."""
        assert self.journal is not None
        self.journal.append(prefix)
        self.prefixes.append(prefix)

    def drop(self, prefix: Prefix) -> None:
        """Forget a prefix; after that its blocks may be written again. Raises OSError."""
        assert self.journal is not None
        self.journal.drop(prefix.key)
        self.prefixes.remove(prefix)
        marks.forget(self.directory, prefix.key)

    def drop_unfinished(self, one: Unfinished) -> None:
        """Forget an unfinished prompt, known or not; after that its blocks may be written again.
        Raises OSError.
        """
        unfinished_path(self.directory, one.key).unlink(missing_ok=True)
        self.unfinished = [other for other in self.unfinished if other.key != one.key]

    def shorten(self, block_bytes: Sequence[int]) -> None:
        """Leave no free slots in the files, `block_bytes` being of each layer, unless somebody
        reads there. Only `close` may follow.
        """
        if self.journal and self.prefixes and not readers.are_there(self.directory):
            try:
                compact(self.directory, self.journal, self.prefixes, block_bytes)
            except (OSError, KVStoreError) as error:
                logger.info("%s: not made shorter: %s", self.directory, error)

    def close(self) -> None:
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        with ExitStack() as stack:
            stack.callback(os.close, lock)
            if not self.prefixes and not self.unfinished:
                stack.callback(remove_files, self.directory)
            for part in (*self.files, *([self.journal] if self.journal else [])):
                stack.callback(part.close)


def default_parent() -> Path:
    """Where directories are made if the user names none."""
    return cache_directory() / "kv"


def make_home(
    parent: Path, geometry: KVGeometry, fingerprint: str, *, keeping: bool
) -> KVDirectory:
    """A new directory in `parent`, for this user only. With `keeping`, it has a journal.

    Raises KVStoreError if `parent` cannot be written, DoesNotFitError if it is full.
    """
    made = _make_directory(parent)
    directory = made.path
    with ExitStack() as stack:
        stack.callback(os.close, made.descriptor)
        stack.callback(remove_files, directory)
        files = _layer_files(directory, geometry, fingerprint, stack)
        home = KVDirectory(directory, made.descriptor, files)
        if keeping and made.locked:
            try:
                home.journal = Journal(directory, home_fields(geometry, fingerprint), create=True)
            except OSError as error:
                raise storage_error(error, directory, "making a KV file") from error
        elif keeping:
            logger.warning("%s cannot be locked: its prefix cache will not be saved", directory)
        stack.pop_all()
        return home


def open_home(directory: Path, geometry: KVGeometry, fingerprint: str) -> KVDirectory | None:
    """The directory that another store left, if it is free and of the same model; then only its
    sound prefixes and unfinished prompts are left in it.
    """
    with ExitStack() as stack:
        try:
            lock = take_over(directory)
            if lock is None:
                return None
            stack.callback(os.close, lock)
            fields = home_fields(geometry, fingerprint)
            journal = stack.enter_context(Journal(directory, fields, create=False))
            files = [
                stack.enter_context(LayerFile(directory, i, geometry, fingerprint, create=False))
                for i in range(geometry.num_layers)
            ]
            _, found, useless = read_journal(directory)
            sound = sound_prefixes(found, files, geometry)
            if len(sound) < len(found):
                logger.warning(
                    "%s: %d cached prefixes are damaged", directory, len(found) - len(sound)
                )
            if useless or len(sound) < len(found):
                journal.replace(sound)
            remove_partial(directory)
            unfinished = sound_unfinished(directory, fields, sound, files, geometry)
            read = readers.are_there(directory)  # maybe what is kept no more
            for layer_idx, file in enumerate(files):
                if read:
                    file.keep_all()
                else:
                    kept = [prefix.layers[layer_idx].blocks for prefix in sound]
                    for one in unfinished:
                        kept += [layer.blocks for layer in one.prefix.layers[layer_idx:][:1]]
                    file.keep(set(itertools.chain.from_iterable(kept)))
        except (OSError, KVStoreError) as error:
            logger.info("%s: its prefix cache cannot be used: %s", directory, error)
            return None
        home = KVDirectory(directory, lock, files)
        home.journal, home.prefixes, home.unfinished = journal, sound, unfinished
        stack.pop_all()
        return home


def find_homes(parent: Path) -> Iterator[Path]:
    """Directories in `parent` that look like homes of this user, last written first."""
    found = []
    with suppress(OSError):
        for path in parent.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if is_private(path.lstat()):
                    found.append((_last_written(path), path))
    yield from (path for _, path in sorted(found, reverse=True))


def check_parent(parent: Path) -> None:
    """Raise KVStoreError unless homes can be made in `parent`, which need not be there."""
    try:
        check_writable_directory(parent)
    except InputError as error:
        raise KVStoreError(error.message, hint=_ELSEWHERE) from error


def reap_homes(parent: Path) -> None:
    """Remove what killed processes left in `parent`, but for what they have kept."""
    reap(find_homes(parent), _remove_unkept)


def is_home(directory: Path) -> bool:
    """Whether files of ours are in a directory."""
    with suppress(OSError):
        return any(_is_kv_file(path) for path in _files_in(directory))
    return False


def strangers_in(directory: Path) -> list[Path]:
    """What is in a home, and not a file of ours."""
    found: list[Path] = []
    with suppress(OSError):
        ours = {path for path in _files_in(directory) if _is_kv_file(path)}
        found = sorted(path for path in directory.iterdir() if path not in ours)
    return found


def remove_files(directory: Path) -> None:
    """Remove the files of a home and then the directory, unless somebody put something into it."""
    with suppress(OSError):
        for path in _files_in(directory):
            if _is_kv_file(path):
                path.unlink(missing_ok=True)
        directory.rmdir()


def sound_prefixes(
    found: Sequence[Prefix], files: Sequence[LayerFile], geometry: KVGeometry
) -> list[Prefix]:
    """Those that can be used, oldest first. One that knows another content of a block than a later
    one does is out of date.
    """
    sound: list[Prefix] = []
    contents: dict[tuple[int, int], int] = {}
    for prefix in reversed(found):
        if _is_sound(prefix, files, geometry):
            mine = {
                (layer_idx, block): content
                for layer_idx, layer in enumerate(prefix.layers)
                for block, content in zip(layer.blocks, layer.checksums, strict=True)
            }
            if all(contents.get(key, content) == content for key, content in mine.items()):
                contents |= mine
                sound.append(prefix)
    return sound[::-1]


def home_fields(geometry: KVGeometry, fingerprint: str) -> dict[str, Any]:
    """What the journal of a home says of the model, and must be equal to be of use."""
    sizes = itertools.groupby(map(geometry.block_bytes, range(geometry.num_layers)))
    return header_fields(geometry, fingerprint) | {
        "layers": geometry.num_layers,
        "kinds": hashlib.sha256(repr(geometry.kinds).encode()).hexdigest(),
        "block_bytes": [[size, len(list(same))] for size, same in sizes],
    }


def _remove_unkept(directory: Path) -> None:
    if any(map(_may_go_on, unfinished_files(directory))):
        return
    try:
        if (directory / NAME).lstat().st_size > PAGE and read_journal(directory)[1]:
            return
    except FileNotFoundError:
        pass
    except KVStoreError:  # that of another version may have kept something
        return
    remove_files(directory)


def _may_go_on(path: Path) -> bool:
    """Whether a file of an unfinished prompt is, or may be to another version, more than a claim:
    a process has then been killed before it wrote anything else.
    """
    try:
        return read_unfinished(path)[1].num_done > 0
    except (OSError, KVStoreError):
        return True


def _files_in(directory: Path) -> list[Path]:
    return [*directory.glob("layer-*.kv"), *directory.glob("prefixes.*")]


def _is_kv_file(path: Path) -> bool:
    """Whether a file is ours: empty, as a process leaves it that is killed early, or with our
    magic.
    """
    try:
        file = open_own(path, os.O_RDONLY)
    except (OSError, KVStoreError):
        return False
    try:
        return MAGIC.startswith(os.pread(file, len(MAGIC), 0)[: len(MAGIC)])
    finally:
        os.close(file)


def _is_sound(prefix: Prefix, files: Sequence[LayerFile], geometry: KVGeometry) -> bool:
    """Whether every layer has the blocks that the tokens need, in its file."""
    num_tokens = len(prefix.token_ids)
    total = -(-num_tokens // geometry.block_size)
    return (
        total > 0
        and min(prefix.token_ids) >= 0
        and len(prefix.layers) == geometry.num_layers
        and all(
            layer.first + len(layer.blocks) == total
            and len(set(layer.blocks)) == len(layer.blocks)
            and max(layer.blocks, default=-1) < file.num_slots
            and layer.first * geometry.block_size <= geometry.first_needed(layer_idx, num_tokens)
            for layer_idx, (layer, file) in enumerate(zip(prefix.layers, files, strict=True))
        )
    )


def _layer_files(
    directory: Path, geometry: KVGeometry, fingerprint: str, stack: ExitStack
) -> list[LayerFile]:
    files: list[LayerFile] = []
    for layer_idx in range(geometry.num_layers):
        try:
            file = LayerFile(directory, layer_idx, geometry, fingerprint)
        except OSError as error:
            raise storage_error(error, directory, "making a KV file") from error
        files.append(stack.enter_context(file))
    return files


def _make_directory(parent: Path) -> Scratch:
    """One of ours in `parent`, which is made too. Raises KVStoreError."""

    def make() -> Scratch:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return make_directory(parent, PREFIX)

    try:
        return retrying(make)
    except OSError as error:
        message = f"{parent}: cannot keep KV there: {error.strerror}"
        raise KVStoreError(message, hint=_ELSEWHERE) from error


def _last_written(directory: Path) -> float:
    with suppress(OSError):
        return (directory / NAME).lstat().st_mtime
    return 0.0
