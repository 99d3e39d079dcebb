"""Models on disk by id: paths, what counts as there, and fetching with a hub that is made up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from ollm_core import CatalogEntry, DoesNotFitError, InputError, OllmError, UnknownModelError
from ollm_core.checkpoint.hub import is_on_disk, local_path, models_root, pull, resolve
from ollm_core.plugins.registry import Registry

ENTRY = CatalogEntry("tiny", "someone/tiny", 4, 16, {"model_type": "llama"})


@pytest.fixture
def registry():
    return Registry.discover()


def write_model(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": torch.zeros(4)}, directory / "model.safetensors")


class FakeHub:
    """Stands where the hub's client does: the first download may break off, the next goes on."""

    def __init__(self, monkeypatch, source: Path, breaks: int = 0, error: Exception | None = None):
        self.source, self.breaks, self.error, self.calls = source, breaks, error, []
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.model_info)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def model_info(self, repo, timeout):
        if self.error:
            raise self.error
        return type("Info", (), {"sha": "abc"})

    def download(self, repo, local_dir, **options):
        self.calls.append(options)
        local_dir.mkdir(exist_ok=True)
        shutil.copy(self.source / "config.json", local_dir)
        if self.breaks:
            self.breaks -= 1
            raise ConnectionError("the line went dead\nand more")
        shutil.copy(self.source / "model.safetensors", local_dir)


def test_models_root(monkeypatch, tmp_path):
    """The argument wins over the environment, which wins over the home directory."""
    monkeypatch.delenv("OLLM_MODELS", raising=False)
    assert models_root() == Path.home() / ".cache/ollm/models"
    monkeypatch.setenv("OLLM_MODELS", str(tmp_path))
    assert models_root() == tmp_path
    assert models_root("~/elsewhere") == Path.home() / "elsewhere"


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_id_is_a_plain_name(name, tmp_path):
    """An id cannot lead out of the models directory."""
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


def test_resolve_offers_pull(registry, tmp_path):
    """An id of the catalog that is not on disk is answered with the command that fetches it."""
    _, entry, _ = next(iter(registry.catalog()))
    with pytest.raises(InputError, match=f"ollm pull {entry.id}"):
        resolve(entry.id, registry, tmp_path)


def test_pull_goes_on_after_a_break(monkeypatch, tmp_path):
    """A model has its name only once it is whole, and an interrupted pull keeps what it has."""
    write_model(tmp_path / "source")
    hub = FakeHub(monkeypatch, tmp_path / "source", breaks=1)
    with pytest.raises(OllmError, match=r"cannot fetch someone/tiny: the line went dead\. hint"):
        pull(ENTRY, tmp_path / "models")
    assert not is_on_disk("tiny", tmp_path / "models")
    assert not (tmp_path / "models" / "tiny").exists()
    path = pull(ENTRY, tmp_path / "models")
    assert path == tmp_path / "models" / "tiny"
    assert is_on_disk("tiny", tmp_path / "models")
    assert [item.name for item in path.parent.iterdir()] == ["tiny"]
    assert len(hub.calls) == 2
    assert hub.calls[0]["revision"] == "abc"
    assert not any("bin" in name or "pt" in name for name in hub.calls[0]["allow_patterns"])
    patterns = {name: hub.calls[0][name] for name in ("allow_patterns", "ignore_patterns")}
    code = ["tokenization_x.py", "custom_generate/generate.py", "vocab.pkl", "vocab.json"]
    assert list(filter_repo_objects(code, **patterns)) == ["vocab.json"]


def test_pull_twice_asks_once(monkeypatch, tmp_path):
    """What is on disk is not fetched again, unless forced; then the user's other files stay."""
    write_model(tmp_path / "source")
    hub = FakeHub(monkeypatch, tmp_path / "source")
    path = pull(ENTRY, tmp_path)
    (path / "notes").write_text("mine")
    pull(ENTRY, tmp_path)
    assert len(hub.calls) == 1
    pull(ENTRY, tmp_path, force=True)
    assert hub.calls[1]["force_download"]
    assert (path / "notes").read_text() == "mine"


def test_pull_keeps_off_what_is_not_a_model(monkeypatch, tmp_path):
    """A directory of that name which holds something else is left alone."""
    FakeHub(monkeypatch, tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "notes").write_text("mine")
    with pytest.raises(InputError, match="holds no whole model"):
        pull(ENTRY, tmp_path)
    assert (tmp_path / "tiny" / "notes").read_text() == "mine"


def test_pull_says_what_gated_means(monkeypatch, tmp_path):
    """A model behind terms names the page where they are accepted."""
    error = GatedRepoError.__new__(GatedRepoError)
    FakeHub(monkeypatch, tmp_path, error=error)
    with pytest.raises(OllmError, match=r"https://huggingface\.co/someone/tiny"):
        pull(ENTRY, tmp_path)


def test_pull_needs_room(monkeypatch, tmp_path):
    """A model larger than the disk is refused before a byte is fetched."""
    hub = FakeHub(monkeypatch, tmp_path)
    big = CatalogEntry("big", "someone/big", 1, 1 << 60, {})
    with pytest.raises(DoesNotFitError, match="big needs"):
        pull(big, tmp_path)
    assert not hub.calls
