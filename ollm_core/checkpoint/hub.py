"""Fetches models from the Hugging Face hub: the files that a run needs, no others, and no code.

The one module that connects to anything, and only when `pull` or `fetch_config` is called. The
hub's own client does it, so that its variables count: HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollm_core.checkpoint.hub_download import download
from ollm_core.checkpoint.hub_refusals import refusal
from ollm_core.checkpoint.locate import is_model, local_path, partial_of, snapshot
from ollm_core.checkpoint.recognition import LORA_CONFIG, other_form
from ollm_core.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    open_checkpoint,
    read_config,
    weight_files,
)
from ollm_core.contracts.model import CatalogEntry, Config
from ollm_core.errors import CheckpointError, DoesNotFitError, InputError, OllmError
from ollm_core.files.untrusted_json import show
from ollm_core.memory.sizes import format_size

CONNECT_SECONDS = 10.0
"""How long to wait for the hub's first answer."""

_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]{0,199}", re.ASCII)
_SMALL = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*\.(json|model)|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.tiktoken|spiece\.model"
    r"|sentencepiece.*\.model|chat_template\.(json|jinja)"
)
"""What a run reads beside the weights."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A hub repository at one commit."""

    name: str
    revision: str
    files: Mapping[str, int | None]
    """Bytes by name, of the files at its top level whose names are plain: no path leads out."""


def ask(repository: str) -> Repository:
    """What the hub has under `owner/name` now. Raises OllmError if it refuses, or is not there."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, timeout=CONNECT_SECONDS, files_metadata=True)
    except Exception as error:
        raise refusal(repository, error) from error
    files = {one.rfilename: one.size for one in info.siblings or ()}
    plain = {name: size for name, size in files.items() if _PLAIN.fullmatch(name)}
    return Repository(repository, str(info.sha or "main"), plain)


def fetch_config(repository: str) -> tuple[dict[str, Any], str]:
    """The config.json of a hub repository, alone, and where it came from, in words. Where the hub
    cannot be reached, the one that the hub's cache has. Raises OllmError.
    """
    try:
        found = ask(repository)
        _require_config(found)
        (path,) = _fetch(found, ["config.json"])
        return read_config(path.parent), f"config.json of {repository}, fetched from the hub"
    except OllmError:
        cached = snapshot(repository)
        if cached is None or not (cached / "config.json").is_file():
            raise
        return read_config(cached), f"config.json of {repository} in the hub's cache"


def pull(
    entry: CatalogEntry,
    models_dir: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: bool = False,
    check: Callable[[Config], object] | None = None,
) -> Path:
    """Fetch a model from the hub and return its directory.

    What the hub's cache has whole is not fetched again. A broken connection is taken up where it
    broke; a pull that ended early keeps the files that are whole. The directory appears under its
    name only once it is whole, every file of the size that the hub states. Before the weights,
    `check` is called with the config, and may refuse. Pickled weights and code are never fetched.
    `force` fetches again what is there; `progress` shows bars on stderr.

    Raises OllmError if the hub cannot be reached or refuses, DoesNotFitError if the disk is too
    small, InputError if something else has the name, CheckpointError for a repository without
    weights that can be opened.
    """
    target = local_path(entry.id, models_dir)
    if not force:
        if is_model(target):
            return target
        cached = snapshot(entry.repo)
        if cached and is_model(cached):
            return cached
    partial = partial_of(target)
    if target.exists():
        if not force:
            raise InputError(f"{target} exists and holds no whole model", hint="--force fetches it")
        if partial.exists():
            raise InputError(f"both {target} and {partial} exist", hint=f"remove {partial}")
    found = ask(entry.repo)
    weights = _require_weights(found)
    fetch = _Download(found, partial, force, progress)
    begun = partial.exists() or target.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(partial)
        with _alone(partial):
            small = {name for name in found.files if _SMALL.fullmatch(name)}
            fetch(small | {weights} - {SINGLE_FILE})
            config = read_config(partial)
            if check is not None:
                check(config)
            fetch(weight_files(partial, weights), room=True)
            open_checkpoint(partial)
        partial.rename(target)
    except OSError as error:
        raise OllmError(f"cannot write {target}: {error.strerror or error}") from error
    except OllmError:
        if not begun:
            _leave_nothing(partial)
        raise
    return target


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Make the directory, if need be, and hold it against other pulls. What a killed one left there
    unfinished is removed: the hub's client does not go on with it. Raises InputError.
    """
    directory.mkdir(exist_ok=True)
    lock = directory / ".lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another pull writes to {directory}", hint="wait for it") from None
        for path in directory.glob(".cache/huggingface/download/*.incomplete"):
            path.unlink(missing_ok=True)
        yield
        lock.unlink()


def _leave_nothing(partial: Path) -> None:
    """Remove a download that was begun in this pull and has no weights yet."""
    if not any(partial.glob("*.safetensors")):
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            partial.parent.rmdir()  # of the owner, if it is empty


def _fetch(
    source: Repository,
    names: Iterable[str],
    directory: Path | None = None,
    *,
    force: bool = False,
    shown_bytes: int = 0,
) -> list[Path]:
    """As `download`. Raises OllmError."""
    try:
        return download(
            source.name, source.revision, names, directory, force=force, shown_bytes=shown_bytes
        )
    except Exception as error:
        raise refusal(source.name, error) from error


class _Download:
    """Files of one repository into one directory."""

    def __init__(self, source: Repository, directory: Path, force: bool, progress: bool) -> None:
        self._source, self._directory = source, directory
        self._force, self._progress = force, progress

    def __call__(self, names: Iterable[str], *, room: bool = False) -> None:
        """Fetch the files, and hold their sizes against those that the hub states. With `room`,
        refuse what the disk cannot take.
        """
        wanted = sorted(set(names))
        missing = [name for name in wanted if name not in self._source.files]
        if missing:
            raise CheckpointError(
                f"{self._source.name} lists {show(missing[0])}, and does not have it",
                hint="its author has not uploaded all of it",
            )
        if room:
            self._check_room(wanted)
        coming = sum(map(self._lacking, wanted)) if self._progress and room else 0
        _fetch(self._source, wanted, self._directory, force=self._force, shown_bytes=coming)
        for name in wanted:
            self._check_size(name)

    def _check_room(self, names: Iterable[str]) -> None:
        needed = sum(size or 0 for name in names if (size := self._lacking(name)))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise DoesNotFitError(
                f"{self._source.name} needs {format_size(needed)} of disk, "
                f"{self._directory.parent} has {format_size(free)} free",
                hint="choose another disk with --models-dir",
            )

    def _lacking(self, name: str) -> int:
        """Bytes of a file that are still to be fetched, as far as the hub tells."""
        size = self._source.files[name] or 0
        path = self._directory / name
        return size if self._force or not path.is_file() or path.stat().st_size != size else 0

    def _check_size(self, name: str) -> None:
        path, stated = self._directory / name, self._source.files[name]
        there = path.stat().st_size if path.is_file() else None
        if there is None or stated not in (None, there):
            path.unlink(missing_ok=True)  # so that the next pull fetches it, and does not trust it
            got = "nothing" if there is None else f"{there} bytes"
            raise OllmError(
                f"{self._source.name}: {show(name)} should have {stated} bytes, got {got}",
                hint="pull again; if that does not help, the hub or a proxy changes the file",
            )


def _require_config(found: Repository) -> None:
    if "config.json" in found.files:
        return
    held = other_form(found.files)
    raise CheckpointError(
        f"{found.name} has no config.json{f'; {held}' if held else ''}",
        hint=_instead(found),
    )


def _require_weights(found: Repository) -> str:
    """The file that is, or lists, the weights. Raises CheckpointError for a repository without."""
    _require_config(found)
    if LORA_CONFIG in found.files:
        raise CheckpointError(
            f"{found.name} has a LoRA adapter, {LORA_CONFIG}, beside the model or in its place",
            hint="pull its base model; a merged copy (merge_and_unload of peft) can be opened",
        )
    for name in (SINGLE_FILE, INDEX_FILE):
        if name in found.files:
            return name
    held = other_form(found.files)
    raise CheckpointError(
        f"{found.name} has no {SINGLE_FILE} and no index{f'; {held}' if held else ''}",
        hint=_instead(found),
    )


def _instead(found: Repository) -> str:
    """What to do about a repository that has no safetensors weights."""
    gguf = next((name for name in sorted(found.files) if name.lower().endswith(".gguf")), None)
    if gguf:
        return f"hf download {found.name} {gguf} --local-dir . && ollm import {gguf}"
    return "look on the hub for the same model in safetensors"
