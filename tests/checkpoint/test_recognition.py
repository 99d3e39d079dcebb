"""Directories that are no plain checkpoint: each is told by name, and nothing in it is opened."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import ollm
from ollm_core import CheckpointError, ConfigError, OllmError, UnsupportedError
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config

OTHER_FORMS = {
    "pytorch_model.bin": "pickle",
    "pytorch_model-00001-of-00002.bin": "pickle",
    "model.pt": "pickle",
    "model-00001-of-00001.safetensors": "index",
    "consolidated.safetensors": "author",
    "consolidated.00.pth": "author",
    "model.fp16.safetensors": "rename",
    "diffusion_pytorch_model.safetensors": "rename",
    "tiny-Q4_K_M.gguf": "ollm import",
    "tf_model.h5": "framework",
    "adapter_model.safetensors": "merge",
    "adapter_config.json": "merge",
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_weights_in_another_form(tmp_path, name):
    """The file that is there is named, and what to do. It is a pipe: opening it would hang."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    message = str(refused.value)
    assert name in message
    assert OTHER_FORMS[name] in message
    assert refused.value.exit_code == 2


def test_a_name_cannot_forge_a_line(tmp_path):
    """A file's name comes escaped."""
    (tmp_path / "x\n\x1b[2Jerror: y.bin").touch()
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["adapter_config.json", "x.gguf", "notes.txt"])
def test_no_config(tmp_path, name):
    """Without a config.json, a LoRA adapter and a GGUF file are told from nothing at all."""
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"config\.json: no such file") as refused:
        read_config(tmp_path)
    assert (name in str(refused.value)) is (name != "notes.txt")


def scaled(tensors):
    """As bitsandbytes and others leave it: bytes, and a scale beside each."""
    projections = [name for name in tensors if "_proj" in name]
    packed = {name: tensors[name].to(torch.uint8) for name in projections}
    return {**tensors, **packed, **{f"{name}.absmax": torch.ones(3) for name in projections}}


def stored_as(dtype):
    """The projections in another dtype, with nothing beside them."""
    return lambda ts: {n: t.to(dtype) if "_proj" in n else t for n, t in ts.items()}


LORA = "model.layers.0.mlp.gate_proj.lora_A.weight"
NOT_PLAIN = {
    # what is stored, what config.json says, error, word
    "bitsandbytes": (scaled, {"quant_method": "bitsandbytes"}, UnsupportedError, "bitsandbytes"),
    "bitsandbytes, unsaid": (scaled, None, CheckpointError, "absmax"),
    "fp8": (stored_as(torch.float8_e4m3fn), {"quant_method": "fp8"}, UnsupportedError, "'fp8'"),
    "fp8, unsaid": (stored_as(torch.float8_e4m3fn), None, CheckpointError, "F8_E4M3"),
    "gptq, plain": (dict, {"quant_method": "gptq", "bits": 4}, UnsupportedError, "'gptq'"),
    "mxfp4, plain": (dict, {"quant_method": "mxfp4"}, UnsupportedError, "'mxfp4'"),
    "no object": (dict, ["x\n"], UnsupportedError, "quantization_config"),
    "int8": (stored_as(torch.int8), None, CheckpointError, "I8"),
    "LoRA": (lambda ts: {**ts, LORA: torch.ones(2, 64)}, None, CheckpointError, "lora_A"),
    "no prefix": (
        lambda ts: {n.removeprefix("model."): t for n, t in ts.items()},
        None,
        CheckpointError,
        "lacks",
    ),
    "another prefix": (
        lambda ts: {f"language_model.{n}": t for n, t in ts.items()},
        None,
        CheckpointError,
        "language_model.",
    ),
    "more rows": (
        lambda ts: {n: torch.cat([t, t[:8]]) if "embed" in n else t for n, t in ts.items()},
        None,
        CheckpointError,
        "207",
    ),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_a_checkpoint_that_is_not_plain(tiny, case):
    """Quantised, with LoRA tensors, under other names: one line that names it, exit code 2."""
    change, quantization, error, word = NOT_PLAIN[case]
    tensors = load_file(tiny / "model.safetensors")
    save_file(change(tensors), tiny / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(error) as refused:
        ollm.load(tiny, device="cpu")
    assert word in str(refused.value)
    assert str(refused.value).isprintable()
    assert refused.value.exit_code == 2


def test_an_adapter_beside_a_model(tiny):
    """transformers applies it or not, by what is installed: so neither is done."""
    (tiny / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is there") as refused:
        ollm.load(tiny, device="cpu")
    assert "move adapter_config.json away" in refused.value.hint


def test_weights_by_another_name(tiny):
    """`transformers_weights` would make transformers read another file than is read here."""
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "transformers_weights": "x\n"}))
    with pytest.raises(OllmError, match="transformers_weights"):
        ollm.load(tiny, device="cpu")
