"""Finds models on disk by id, and downloads them from the hub.

Knows directories and ids, and nothing of how a model is opened. Only `pull` reaches the network.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollm_core.checkpoint.safetensors import open_checkpoint
from ollm_core.contracts.model import CatalogEntry
from ollm_core.errors import DoesNotFitError, InputError, OllmError
from ollm_core.files.paths import absolute, cache_directory, check_directory
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.plugins.registry import Registry

CONNECT_SECONDS = 10.0
"""How long `pull` waits for the hub's first answer."""

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_SUBFOLDERS = "*/*"  # other formats of the same model: original/, onnx/


def models_root(models_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of models: the argument, else `OLLM_MODELS`, else `~/.cache/ollm/models`. It
    need not be there. Raises InputError if something else is.
    """
    chosen = models_dir or os.environ.get("OLLM_MODELS")
    root = absolute(chosen) if chosen else cache_directory() / "models"
    check_directory(root, "--models-dir or OLLM_MODELS names it")
    return root


def local_path(model_id: str, models_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the model `model_id` lies, or would. Raises InputError if it is not a plain name."""
    if model_id in ("", ".", "..") or "/" in model_id or os.sep in model_id:
        raise InputError(f"{model_id!r} is not a model id", hint="see `ollm list-models`")
    return models_root(models_dir) / model_id


def may_be_id(name: str) -> bool:
    """Whether this is a plain name, as ids are, and not a path."""
    return os.sep not in name and not name.startswith(("~", "."))


def is_on_disk(model_id: str, models_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether the model can be opened: its files are there and agree. Reads headers only."""
    return _is_model(local_path(model_id, models_dir))


def resolve(
    path_or_id: str | os.PathLike[str],
    registry: Registry,
    models_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The directory of a model that is named by its path, or by the id it has in the models
    directory.

    Raises InputError for a path that is no directory or an id that is not on disk yet,
    UnknownModelError for an id that no adapter offers.
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
    imported = local_path(name, models_dir)
    if _is_model(imported):
        return imported
    _, entry = registry.find(name)
    pulled = local_path(entry.id, models_dir)
    if not _is_model(pulled):
        raise InputError(f"{name} is not on disk in {pulled.parent}", hint=f"ollm pull {entry.id}")
    return pulled


def pull(
    entry: CatalogEntry,
    models_dir: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Fetch a catalog model from the hub and return its directory.

    An interrupted pull goes on where it stopped; the directory appears under its name only once it
    is whole. Pickled weights are never fetched. `force` fetches again what is there; `progress`
    shows bars on stderr. Raises OllmError if the hub cannot be reached or refuses, DoesNotFitError
    if the disk is too small, InputError if something else has the name.
    """
    target = local_path(entry.id, models_dir)
    if _is_model(target) and not force:
        return target
    partial = target.with_name(f".{entry.id}.partial")
    if target.exists():
        if not force:
            raise InputError(f"{target} exists and holds no whole model", hint="--force fetches it")
        if partial.exists():
            raise InputError(f"both {target} and {partial} exist", hint=f"remove {partial}")
    revision = _revision(entry)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if not partial.exists() and free < entry.weight_bytes:
            raise DoesNotFitError(
                f"{entry.id} needs {format_size(entry.weight_bytes)} of disk, "
                f"{target.parent} has {format_size(free)} free",
                hint="choose another disk with --models-dir",
            )
        if target.exists():
            target.rename(partial)
        _download(entry, revision, partial, force, progress)
        open_checkpoint(partial)
        partial.rename(target)
    except OSError as error:
        raise OllmError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _is_model(directory: Path) -> bool:
    if not os.path.isfile(directory / "config.json"):
        return False
    try:
        open_checkpoint(directory)
    except OllmError:
        return False
    return True


def _revision(entry: CatalogEntry) -> str:
    """The commit to fetch, so that all files are of one version."""
    from huggingface_hub import HfApi

    try:
        revision = HfApi().model_info(entry.repo, timeout=CONNECT_SECONDS).sha
    except Exception as error:
        raise _refusal(entry, error) from error
    return str(revision or "main")


def _download(
    entry: CatalogEntry, revision: str, directory: Path, force: bool, progress: bool
) -> None:
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc] # tqdm has no types
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # the hub's own class understands it
            super().__init__(*args, **options | {"disable": not progress})

    try:
        snapshot_download(
            entry.repo,
            revision=revision,
            local_dir=directory,
            allow_patterns=list(_WANTED),
            ignore_patterns=[_SUBFOLDERS],
            force_download=force,
            tqdm_class=Bar,
        )
    except Exception as error:
        raise _refusal(entry, error) from error


def _refusal(entry: CatalogEntry, error: Exception) -> OllmError:
    """One clear line for anything that the hub's client raises."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return OllmError(
            f"{entry.repo} asks you to accept its terms first",
            hint=f"accept them at https://huggingface.co/{entry.repo}, then `hf auth login`",
        )
    if isinstance(error, RepositoryNotFoundError):
        return OllmError(
            f"the hub has no {entry.repo} that you may read", hint="log in with `hf auth login`"
        )
    cause = (str(error).splitlines() or [type(error).__name__])[0]
    return OllmError(
        f"cannot fetch {entry.repo}: {cause}",
        hint="check the connection; pulling again goes on where this stopped",
    )
