"""Which reading engine is the faster one here: measured, kept, and gone by."""

from __future__ import annotations

import json

import pytest
import torch

import ollm
from ollm_core.calibration import disk, rates
from ollm_core.calibration.disk import measure_readers
from ollm_core.errors import InputError


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """No rates that this machine has kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_engines_read_a_model_file_or_a_trial(monkeypatch, tmp_path):
    """All of what is there, and nothing is left."""
    monkeypatch.setattr(disk, "_TRIAL_BYTES", 3 << 20)
    monkeypatch.setattr(disk, "_LEAST_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(disk, "_PIECE_BYTES", 1 << 20)
    found = measure_readers(tmp_path)
    assert "mmap" in found
    assert all(rate > 1e5 for rate in found.values())
    assert not list(tmp_path.iterdir())
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes((3 << 20) + 17))
    assert measure_readers(tmp_path).keys() == found.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nowhere_to_measure(tmp_path, monkeypatch):
    """One line that says so."""

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "make_file", refuse)
    with pytest.raises(InputError, match="none can be made: No space"):
        measure_readers(tmp_path)


def test_the_faster_engine_is_used_unless_another_is_named(tiny, ids):
    """A tenth more is needed to leave direct reads; what was not measured changes nothing."""
    with ollm.load(tiny, device="cpu") as model:
        default = model.stats.reader

    def kept(direct, mapped):
        readers = {"direct": direct, "mmap": mapped}
        rates.rates_file().parent.mkdir(parents=True, exist_ok=True)
        rates.rates_file().write_text(json.dumps({rates._disk_key(tiny): {"readers": readers}}))
        with ollm.load(tiny, device="cpu") as model:
            model(input_ids=ids(5)[None])
            return model.stats.reader

    assert kept(1e9, 1.05e9) == default
    assert kept(1e9, 1.2e9) == "mmap"
    assert kept("fast", 2e9) == default
    with ollm.load(tiny, device="cpu", reader=default) as model:
        assert model.stats.reader == default
    assert rates.find_rates(tiny, torch.device("cpu"), torch.float32).disk.source == "assumed"
