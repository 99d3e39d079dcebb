"""Where models lie on this machine: the models directory, `./models`, and the hub's own cache.

Knows names and directories, and nothing of how a model is opened or fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ollm_core.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    open_checkpoint,
    weight_files,
)
from ollm_core.errors import InputError, OllmError
from ollm_core.files.paths import absolute, cache_directory, check_directory

if TYPE_CHECKING:
    from ollm_core.plugins.registry import Registry

HERE = "models"
"""A directory of models below the current one, as README's examples make it."""

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_PREFIX = "models--"
"""Of a model's directory in the hub's cache, before its repository with "--" for "/"."""


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A model that is here."""

    name: str
    """What opens it: an id, a hub repository, or a path."""
    directory: Path
    place: str
    """"models", "./models" or "hub cache"."""
    weight_bytes: int
    """Of its files of weights."""


def models_root(models_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of models: the argument, else `OLLM_MODELS`, else `~/.cache/ollm/models`. It
    need not be there. Raises InputError if something else is.
    """
    chosen = models_dir or os.environ.get("OLLM_MODELS")
    root = absolute(chosen) if chosen else cache_directory() / "models"
    check_directory(root, "--models-dir or OLLM_MODELS names it")
    return root


def local_path(model_id: str, models_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the model of an id or a hub repository lies in the models directory, or would. Raises
    InputError if it is neither.
    """
    plain = model_id not in ("", ".", "..") and "/" not in model_id and os.sep not in model_id
    if not plain and not is_repository(model_id):
        raise InputError(f"{model_id!r} is not a model id", hint="see `ollm list-models`")
    return models_root(models_dir) / model_id


def is_repository(name: str) -> bool:
    """Whether this has the form of a hub repository, `owner/name`."""
    return bool(_REPOSITORY.fullmatch(name)) and ".." not in name and "--" not in name


def may_be_id(name: str) -> bool:
    """Whether this is a plain name, as ids are, or a hub repository, and not another path."""
    return is_repository(name) or (os.sep not in name and not name.startswith(("~", ".")))


def is_on_disk(model_id: str, models_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether the model can be opened: its files are there and agree. Reads headers only."""
    return is_model(local_path(model_id, models_dir))


def is_model(directory: Path) -> bool:
    """Whether a directory holds a model whose files agree. Reads headers only."""
    if not os.path.isfile(directory / "config.json"):
        return False
    try:
        open_checkpoint(directory)
    except OllmError:
        return False
    return True


def hub_cache() -> Path:
    """The directory in which the hub's client keeps what it fetches, by the variables that it goes
    by: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`. It need not be there.
    """
    environment = os.environ.get
    if chosen := environment("HF_HUB_CACHE") or environment("HUGGINGFACE_HUB_CACHE"):
        return absolute(os.path.expandvars(chosen))
    if home := environment("HF_HOME"):
        return absolute(os.path.expandvars(home)) / "hub"
    base = environment("XDG_CACHE_HOME")
    try:
        caches = absolute(base) if base else Path.home() / ".cache"
    except RuntimeError:  # no home directory: the client cannot have one either
        caches = cache_directory()
    return caches / "huggingface" / "hub"


def snapshot(repository: str) -> Path | None:
    """The directory of a hub repository in the hub's cache, as its branch `main` was when it was
    last fetched, or its only revision. It may lack files.
    """
    directory = hub_cache() / (_PREFIX + repository.replace("/", "--"))
    with suppress(OSError, UnicodeDecodeError):
        commit = (directory / "refs/main").read_text()[:100].strip()
        if not _COMMIT.fullmatch(commit):
            return None
        found = directory / "snapshots" / commit
        return found if found.is_dir() else None
    with suppress(OSError):
        commits = [one for one in (directory / "snapshots").iterdir() if one.is_dir()]
        return commits[0] if len(commits) == 1 else None
    return None


def repository_of(directory: Path) -> str | None:
    """The hub repository whose snapshot in the hub's cache a directory is."""
    home = directory.parents[1] if len(directory.parents) > 1 else directory
    if directory.parent.name != "snapshots" or not home.name.startswith(_PREFIX):
        return None
    return _named_by(home)


def _named_by(home: Path) -> str:
    """The repository of a directory in the hub's cache."""
    return home.name.removeprefix(_PREFIX).replace("--", "/")


def partial_of(target: Path) -> Path:
    """Where the files of an unfinished download to `target` lie."""
    return target.with_name(f".{target.name}.partial")


def has_config(directory: Path) -> bool:
    """Whether a directory may hold a model: a glance, where `is_model` reads every header."""
    return os.path.isfile(directory / "config.json")


def locate(
    name: str,
    registry: Registry,
    models_dir: str | os.PathLike[str] | None = None,
    test: Callable[[Path], bool] = is_model,
) -> Path | None:
    """The directory of the model of an id, an alias or a hub repository, if it is here, whole by
    the `test`: in the models directory, in `./models`, or in the hub's cache, in this order.
    """
    names = _names(name, registry)
    roots = (models_root(models_dir), absolute(HERE))
    own = (root / one for root in roots for one in names)
    cached = (found for one in names if is_repository(one) and (found := snapshot(one)))
    return next(filter(test, chain(own, cached)), None)


def resolve(
    path_or_id: str | os.PathLike[str],
    registry: Registry,
    models_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The directory of a model that is named by its path, its id, an alias or its hub repository.

    Raises InputError for a path that is no directory or a model that is not on disk yet,
    UnknownModelError for an id that no catalog has.
    """
    path = absolute(path_or_id)
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        gguf = path.suffix.lower() == ".gguf"
        hint = f"ollm import {path}" if gguf else "name the directory that holds config.json"
        raise InputError(f"{path} is a file, and a model is a directory", hint=hint)
    name = os.fspath(path_or_id)
    if not may_be_id(name):
        raise InputError(f"there is no directory {path}", hint="ollm list-models shows known ids")
    found = locate(name, registry, models_dir)
    if found is None:
        raise absent(name, registry, models_dir)
    return found


def absent(
    name: str, registry: Registry, models_dir: str | os.PathLike[str] | None = None
) -> InputError:
    """The error for a model that `locate` does not find. Raises UnknownModelError for a name that
    is no hub repository and that no catalog has.
    """
    if not is_repository(name):
        registry.find(name)
    names, known = _names(name, registry), registry.named(name)
    fetch = f"ollm pull {known[1].id if known else name}"
    if any(partial_of(local_path(one, models_dir)).exists() for one in names):
        return InputError(f"{name} is not fetched to its end", hint=f"{fetch} goes on with it")
    if any(is_repository(one) and snapshot(one) for one in names):
        return InputError(f"only a part of {name} is in the hub's cache", hint=fetch)
    if known is None:  # it may be meant as a path
        return InputError(
            f"there is no directory {name}, and no model of that name on disk",
            hint=f"{fetch}, if it is a repository of the hub",
        )
    return InputError(f"{name} is not on disk in {models_root(models_dir)}", hint=fetch)


def models_on_disk(models_dir: str | os.PathLike[str] | None = None) -> list[OnDisk]:
    """Every model of which all files are here, by name within each place. Reads no headers: that
    the files agree is for a run to say.
    """
    root, here = models_root(models_dir), absolute(HERE)
    candidates = [(name, path, "models") for name, path in _below(root)]
    if here != root:
        candidates += [(f"{HERE}/{name}", path, "./models") for name, path in _below(here)]
    candidates += [(name, path, "hub cache") for name, path in _cached()]
    found = []
    for name, path, place in candidates:
        with suppress(OllmError, OSError):
            found.append(OnDisk(name, path, place, _weight_bytes(path)))
    return found


def _weight_bytes(directory: Path) -> int:
    """Of the files of weights. Raises OSError where one is missing, CheckpointError."""
    single = (directory / SINGLE_FILE).is_file()
    names = weight_files(directory, SINGLE_FILE if single else INDEX_FILE)
    return sum((directory / name).stat().st_size for name in names)


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    """Directories that may be models: those of ids, and those of hub repositories."""
    with suppress(OSError):
        for entry in sorted(root.iterdir()):
            if entry.name.startswith("."):
                continue
            if (entry / "config.json").is_file():
                yield entry.name, entry
            elif entry.is_dir():
                for inner in sorted(entry.iterdir()):
                    name = f"{entry.name}/{inner.name}"
                    if is_repository(name) and (inner / "config.json").is_file():
                        yield name, inner


def _cached() -> Iterator[tuple[str, Path]]:
    """Directories in the hub's cache that may be models."""
    with suppress(OSError):
        for entry in sorted(hub_cache().glob(f"{_PREFIX}*")):
            name = _named_by(entry)
            directory = snapshot(name) if is_repository(name) else None
            if directory and (directory / "config.json").is_file():
                yield name, directory


def _names(name: str, registry: Registry) -> list[str]:
    """The name, and the id and the hub repository of the model that it names, this one last."""
    known = registry.named(name)
    if known is None:
        return [name]
    own = [] if is_repository(name) else [name]
    return list(dict.fromkeys([*own, known[1].id, known[1].repo]))
