"""Opening a model: every wrong input is one line that names the file and the cause."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import ollm
from ollm_core import (
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    InputError,
    KVStoreError,
    OllmError,
    ReadError,
    UnknownModelError,
    UnsupportedError,
)
from ollm_core.errors import DeviceError


def edit(directory, **changes):
    """Change config.json; None removes a key."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(directory, change):
    """Save the weights again after `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def cut(directory):
    """Cut the weights in half."""
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


NORM = "model.norm.weight"
WRONG_MODELS = {
    "no config": (lambda d: (d / "config.json").unlink(), ConfigError, "config.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ConfigError, "config.json"),
    "no model_type": (lambda d: edit(d, model_type=None), ConfigError, "model_type"),
    "unknown model_type": (lambda d: edit(d, model_type="x9"), UnknownModelError, "x9"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), CheckpointError, "safetensors"),
    "cut weights": (cut, CheckpointError, "model.safetensors"),
    "missing tensor": (lambda d: rewrite(d, lambda t: t.pop(NORM)), CheckpointError, NORM),
    "extra tensor": (
        lambda d: rewrite(d, lambda t: t.update(extra=torch.zeros(2))),
        CheckpointError,
        "extra",
    ),
    "wrong shape": (
        lambda d: rewrite(d, lambda t: t.update({NORM: torch.zeros(65)})),
        CheckpointError,
        NORM,
    ),
    "wrong dtype": (
        lambda d: rewrite(d, lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int32)})),
        CheckpointError,
        "I32",
    ),
    "other config": (lambda d: edit(d, intermediate_size=113), CheckpointError, "113"),
    "senseless config": (lambda d: edit(d, num_attention_heads=0), ConfigError, "heads"),
    "dynamic rope": (
        lambda d: edit(d, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        UnsupportedError,
        "dynamic",
    ),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_wrong_model(tiny, case):
    """A damaged or foreign model directory is refused before anything runs."""
    damage, error, words = WRONG_MODELS[case]
    damage(tiny)
    with pytest.raises(error, match=words) as refused:
        ollm.load(tiny, device="cpu").close()
    assert isinstance(refused.value, OllmError)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"device": "cuda:9"}, DeviceError, "cuda:9"),
        ({"device": "tpu"}, DeviceError, "tpu"),
        ({"dtype": "int3"}, InputError, "int3"),
        ({"kv": "tape"}, InputError, "tape"),
        ({"attention": "magic"}, InputError, "magic"),
        ({"reader": "fast"}, InputError, "fast"),
        ({"chunk_size": 0}, InputError, "chunk_size"),
        ({"device_memory": "8"}, InputError, "'8'"),
        ({"device_memory": 100}, DoesNotFitError, "limit"),
        ({"host_memory": "-1GB"}, InputError, "-1GB"),
    ],
)
def test_wrong_options(tiny, ids, options, error, words):
    """A wrong option is one line with what is allowed."""

    def run():
        with ollm.load(tiny, **{"device": "cpu"} | options) as model:
            model(input_ids=ids(10)[None])

    with pytest.raises(error, match=words) as refused:
        run()
    assert "\n" not in str(refused.value)


def test_unknown_model_id():
    """An id nobody offers, and a directory that is not there."""
    with pytest.raises(UnknownModelError, match="llama99"):
        ollm.load("llama99")
    with pytest.raises(InputError, match="nowhere"):
        ollm.load("./nowhere/at/all")


def test_unwritable_kv_directory(tiny, tmp_path, ids):
    """A KV directory that cannot be made is one line before anything is read, and a model that is
    open can still be used.
    """
    (tmp_path / "file").write_text("")
    with pytest.raises(KVStoreError, match="file/kv"):
        ollm.load(tmp_path, device="cpu", kv="disk", kv_dir=tmp_path / "file/kv")
    with ollm.load(tiny, device="cpu") as model:
        with pytest.raises(KVStoreError, match="file/kv"):
            model.new_cache("disk", tmp_path / "file/kv")
        cache = model.new_cache("device")
        assert model(input_ids=ids(10)[None], past_key_values=cache).logits.shape == (1, 10, 199)


def test_full_kv_disk(tiny, tmp_path, ids, monkeypatch):
    """A disk without room is noticed before the first layer, and nothing stays behind."""
    with ollm.load(tiny, device="cpu", kv="disk", kv_dir=tmp_path / "kv") as model:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DoesNotFitError, match="KV cache: need"):
            model(input_ids=ids(300)[None])
        monkeypatch.undo()
        assert model.stats.weight_passes == 0
    assert list((tmp_path / "kv").iterdir()) == []


def test_weights_cut_under_an_open_model(make_llama, ids):
    """A checkpoint that is cut while the model is open gives a ReadError, and closing works."""
    directory = make_llama(
        torch.bfloat16, hidden_size=256, intermediate_size=1024, num_hidden_layers=6
    )
    with ollm.load(directory, device="cpu", device_memory="8MB") as model:
        model(input_ids=ids(10)[None])
        cut(directory)

        def run():
            for _ in range(2):
                model(input_ids=ids(10)[None])

        with pytest.raises(ReadError, match=r"model\.safetensors"):
            run()
