"""GGUF files of one small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a file of one small model, with changes, in an empty directory."""
    from gguf_files import write_gguf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120}
    config = AutoConfig.for_model("llama", **sizes, **heads, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)

    def make(**changes: Any) -> Path:
        return write_gguf(tmp_path_factory.mktemp("gguf") / "x.gguf", model, **changes)

    return make
