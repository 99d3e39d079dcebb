"""What is found out of a model before anything runs: here against transformers itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ollm_core import ConfigError
from ollm_core.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, open_checkpoint, read_config
from ollm_core.model.spec import ModelSpec, inspect_model
from ollm_core.plugins.registry import Registry

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def registry():
    """What is installed."""
    return Registry.discover()


def edit(directory, **changes):
    """Change config.json; None removes a key."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def spec_of(directory, registry) -> ModelSpec:
    """The model in `directory`, without memory."""
    config = read_config(directory)
    return inspect_model(
        registry.adapter_for(config),
        config,
        open_checkpoint(directory),
        {},
        dtype="auto",
        device=torch.device("cpu"),
        where=directory,
        bare=True,
    )


def write(directory, tensors, files, index_metadata=None):
    """Write `tensors` into files: `files` says which tensor goes to a second one by its name."""
    if files is None:
        save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
        return
    (directory / SINGLE_FILE).unlink()
    weight_map = {name: f"{'b' if files(name) else 'a'}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        part = {name: value for name, value in tensors.items() if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": index_metadata or {}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index))


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MIXTURES = {
    # dtype by a tensor's name, the tensors of a second file, metadata of the index
    "float32 norms": (lambda n: F32 if "norm" in n else BF16, None, {}),
    "float32 all but norms": (lambda n: BF16 if "norm" in n else F32, None, {}),
    "float32 head": (lambda n: F32 if n == HEAD else BF16, None, {}),
    "float32 embedding": (lambda n: F32 if n == EMBEDDING else F16, None, {}),
    "float16 from the second layer on": (lambda n: F16 if ".1." in n else BF16, None, {}),
    "head in the second file": (lambda n: F32 if n == HEAD else BF16, lambda n: n == HEAD, {}),
    "norms in the first file": (
        lambda n: F32 if "norm" in n else BF16,
        lambda n: "norm" not in n,
        {},
    ),
    "dtype in the index": (lambda n: BF16, lambda n: n == HEAD, {"dtype": "float16"}),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_dtype_of_a_mixture(make_llama, registry, case):
    """Where config.json states no dtype, it is the one that transformers takes."""
    dtype_of, files, metadata = MIXTURES[case]
    directory = make_llama()
    edit(directory, dtype=None)
    tensors = load_file(directory / SINGLE_FILE)
    mixed = {name: value.to(dtype_of(name)) for name, value in tensors.items()}
    write(directory, mixed, files, metadata)
    expected = AutoModelForCausalLM.from_pretrained(directory).dtype
    assert spec_of(directory, registry).dtype == expected


@pytest.mark.parametrize("stated", ["float16", "bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_stated_dtype(make_llama, registry, key, stated):
    """What config.json states holds, whatever is stored."""
    directory = make_llama()
    edit(directory, dtype=None)
    edit(directory, **{key: stated})
    assert str(spec_of(directory, registry).dtype) == f"torch.{stated}"


@pytest.mark.parametrize("stated", ["float64", "float8_e4m3fn", ["bfloat16"], {"": "float16"}, "x"])
def test_a_dtype_that_nothing_is_computed_in(make_llama, registry, stated):
    """It is refused by name, where it was taken for none."""
    directory = make_llama()
    edit(directory, dtype=stated)
    with pytest.raises(ConfigError, match="dtype is"):
        spec_of(directory, registry)


def test_both_forms_of_a_checkpoint(make_llama, registry):
    """Beside an index, the single file is what counts, as for transformers."""
    directory = make_llama(BF16)
    single = (directory / SINGLE_FILE).read_bytes()
    write(directory, load_file(directory / SINGLE_FILE), lambda name: name == HEAD)
    (directory / SINGLE_FILE).write_bytes(single)
    assert list(open_checkpoint(directory).files) == [directory / SINGLE_FILE]
