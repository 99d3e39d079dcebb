"""Where models lie: paths, ids, aliases, hub repositories, and the hub's cache."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ollm_core import CatalogEntry, InputError, UnknownModelError
from ollm_core.checkpoint.locate import (
    hub_cache,
    is_on_disk,
    is_repository,
    local_path,
    locate,
    models_on_disk,
    models_root,
    resolve,
    snapshot,
)
from ollm_core.plugins.registry import Registry

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENTRY = CatalogEntry(
    "tiny", "someone/Tiny-1B", 4, 16, {"model_type": "llama"}, aliases=("tiny:1b", "tiny-again")
)


@pytest.fixture
def registry():
    return Registry.discover()


@pytest.fixture
def tiny_registry(registry):
    """A registry that knows one model, by all its names."""
    llama = registry.adapters["llama"]

    class Adapter(type(llama)):
        name = "tiny-llama"

        def catalog(self):
            return (ENTRY,)

    return Registry.of(Adapter())


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Neither models nor a hub cache but those that a test makes."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)


def write_model(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": torch.zeros(4)}, directory / "model.safetensors")
    return directory


def write_snapshot(repository: str, commit: str = COMMIT, *, ref: bool = True) -> Path:
    """As the hub's client leaves one: links to blobs."""
    directory = hub_cache() / f"models--{repository.replace('/', '--')}"
    blobs = write_model(directory / "blobs")
    found = directory / "snapshots" / commit
    found.mkdir(parents=True)
    for blob in blobs.iterdir():
        (found / blob.name).symlink_to(blob)
    if ref:
        (directory / "refs").mkdir(exist_ok=True)
        (directory / "refs/main").write_text(commit)
    return found


def test_models_root(monkeypatch, tmp_path):
    """The argument wins over the environment, which wins over the home directory."""
    monkeypatch.delenv("OLLM_MODELS", raising=False)
    assert models_root() == Path.home() / ".cache/ollm/models"
    monkeypatch.setenv("OLLM_MODELS", str(tmp_path))
    assert models_root() == tmp_path
    assert models_root("~/elsewhere") == Path.home() / "elsewhere"


@pytest.mark.parametrize(
    "name", ["", "..", "a/..", "../a", "/a/b", "a/b/c", ".a/b", "a/.b", "a/b\n", "a/b--c", "a/b c"]
)
def test_id_is_a_plain_name_or_a_repository(name, tmp_path):
    """No id can lead out of the models directory."""
    assert not is_repository(name)
    with pytest.raises(InputError, match="not a model id"):
        local_path(name, tmp_path)


def test_on_disk_means_openable(tmp_path):
    """A config alone, or a truncated checkpoint, is not a model on disk."""
    assert not is_on_disk("tiny", tmp_path)
    write_model(tmp_path / "tiny")
    assert is_on_disk("tiny", tmp_path)
    weights = tmp_path / "tiny" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_on_disk("tiny", tmp_path)


def test_resolve(registry, tmp_path):
    """A directory resolves to itself, an id to its place; all else is an error that says why."""
    write_model(tmp_path / "mine")
    assert resolve(tmp_path / "mine", registry) == tmp_path / "mine"
    assert resolve("mine", registry, tmp_path) == tmp_path / "mine"
    with pytest.raises(InputError, match="no directory"):
        resolve(tmp_path / "gone", registry)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(InputError, match=r"ollm import .*x\.gguf"):
        resolve(tmp_path / "x.gguf", registry)
    with pytest.raises(UnknownModelError, match="nobody-has-this"):
        resolve("nobody-has-this", registry, tmp_path)


def test_resolve_offers_pull(tiny_registry, tmp_path):
    """A model that is not on disk is answered with the command that fetches it, one of which parts
    are there with what is missing.
    """
    for name in ("tiny", "Tiny:1b", "someone/tiny-1b"):
        with pytest.raises(InputError, match=r"is not on disk .*ollm pull tiny$"):
            resolve(name, tiny_registry, tmp_path)
    with pytest.raises(
        InputError, match=r"no directory Qwen/Q, and no model.*ollm pull Qwen/Q, if"
    ):
        resolve("Qwen/Q", tiny_registry, tmp_path)
    (write_snapshot("someone/Tiny-1B") / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"only a part of tiny is in the hub's cache"):
        resolve("tiny", tiny_registry, tmp_path)
    (tmp_path / ".tiny.partial").mkdir()
    with pytest.raises(InputError, match=r"tiny is not fetched to its end.*ollm pull tiny goes on"):
        resolve("tiny", tiny_registry, tmp_path)


def test_every_name_leads_to_every_place(tiny_registry, tmp_path):
    """Id, alias and repository, in any case, name the same model, wherever it lies; the models
    directory comes first, then ./models, then the hub's cache.
    """
    names = ("tiny", "TINY:1B", "tiny-again", "tiny:latest", "someone/Tiny-1B")
    root = tmp_path / "root"
    for write, where in (
        (write_snapshot, "someone/Tiny-1B"),
        (write_model, tmp_path / "models/tiny"),
        (write_model, root / "someone/Tiny-1B"),
        (write_model, root / "tiny"),
    ):
        place = write(where)
        assert [locate(name, tiny_registry, root) for name in names] == [place] * len(names)
    size = (root / "tiny/model.safetensors").stat().st_size
    assert {(one.name, one.place, one.weight_bytes) for one in models_on_disk(root)} == {
        ("tiny", "models", size),
        ("someone/Tiny-1B", "models", size),
        ("models/tiny", "./models", size),
        ("someone/Tiny-1B", "hub cache", size),
    }
    (root / "tiny/model.safetensors").unlink()
    assert ("tiny", "models") not in {(one.name, one.place) for one in models_on_disk(root)}


def test_snapshot(tmp_path, monkeypatch):
    """The commit of `main`, or the only one; never a path that a ref makes up."""
    assert snapshot("o/name") is None
    first = write_snapshot("o/name", ref=False)
    assert snapshot("o/name") == first
    second = first.with_name("f" * 40)
    second.mkdir()
    assert snapshot("o/name") is None  # which of the two?
    refs = first.parents[1] / "refs"
    refs.mkdir()
    for text, expected in (("f" * 40, second), (COMMIT + "\n", first), ("../../../../x", None)):
        (refs / "main").write_text(text)
        assert snapshot("o/name") == expected
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert snapshot("o/name") is None


def test_hub_cache(monkeypatch, tmp_path):
    """The directory is the one that the hub's client uses, variable by variable."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "a"))
    assert hub_cache() == tmp_path / "a"
    monkeypatch.delenv("HF_HUB_CACHE")
    assert hub_cache() == tmp_path / "hf/hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert hub_cache() == tmp_path / "c/huggingface/hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub_cache() == Path.home() / ".cache/huggingface/hub"
