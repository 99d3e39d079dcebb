"""A checkpoint that is not on disk is described as transformers would write it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ollm_adapter_llama import LlamaAdapter
from ollm_conformance.models import meta_model
from ollm_core import ConfigError
from ollm_core.checkpoint.safetensors import open_checkpoint, read_config
from ollm_core.checkpoint.synthetic import describe_checkpoint


def described(config, dtype):
    shapes = {name: tuple(one.shape) for name, one in meta_model(config).named_parameters()}
    return describe_checkpoint(LlamaAdapter(), config, shapes, dtype, Path("x"), lambda f: f)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_lies_where_transformers_puts_it(make_llama, dtype):
    """Its dtype, shape and offset in the file, so that a plan counts the pages of a run."""
    saved = make_llama(getattr(torch, dtype))
    real, made = open_checkpoint(saved).tensors, described(read_config(saved), dtype).tensors
    assert made.keys() == real.keys()
    for name, one in real.items():
        found = made[name]
        assert (found.dtype, found.shape, found.num_bytes) == (one.dtype, one.shape, one.num_bytes)
        assert found.offset == one.offset, name


def test_without_a_dtype_there_is_no_size(make_llama):
    """One line that says what to give."""
    with pytest.raises(ConfigError, match="no dtype in config") as refused:
        described(read_config(make_llama()), "")
    assert "give dtype" in refused.value.hint
