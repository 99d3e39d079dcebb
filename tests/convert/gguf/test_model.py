"""All of a GGUF file is in the model that is made of it, or named in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ollm_core import InputError, UnsupportedError
from ollm_core.convert.gguf.header import GGUFHeader
from ollm_core.convert.gguf.importer import import_gguf
from ollm_core.convert.gguf.model import check_config, check_keys

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that do the reading


NOT_ALL_USED = {
    # keys, tensors, the word that must be in the line
    "unknown key of the model": ({"llama.attention.new": 1.0}, {}, "llama.attention.new"),
    "key of nobody": ({"strange.key": 1}, {}, "strange.key"),
    "unknown key of the tokenizer": ({"tokenizer.ggml.new": 1}, {}, "tokenizer.ggml.new"),
    "charsmap": ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, {}, "precompiled_charsmap"),
    "logit scale": ({"llama.logit_scale": 2.0}, {}, "llama.logit_scale"),
    "attention scale": ({"llama.attention.scale": 0.3}, {}, "llama.attention.scale"),
    "window": ({"llama.attention.sliding_window": 16}, {}, "sliding_window"),
    "experts": ({"llama.expert_count": 4}, {}, "expert_count"),
    "another head size": ({"llama.attention.key_length": 16}, {}, "key_length"),
    "fewer rotated": ({"llama.rope.dimension_count": 4}, {}, "self_attn"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, {}, "yarn"),
    "yarn's own": ({"llama.rope.scaling.yarn_beta_fast": 2.0}, {}, "yarn_beta_fast"),
    "no KV heads": ({"llama.attention.head_count_kv": None}, {}, "head_count_kv"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "epsilon"),
    "vocabulary": ({"llama.vocab_size": 119}, {}, "x.gguf"),
    "another family": ({"general.architecture": "x\x1b[31m"}, {}, "x.gguf"),
    "LoRA": ({"general.type": "adapter"}, {}, "'adapter'"),
    "a part": ({"split.count": 3}, {}, "--merge"),
    "another way to split text": ({"tokenizer.ggml.pre": "new"}, {}, "'new'"),
    "divisors that nothing makes": (
        {},
        {"rope_freqs.weight": np.array([1.0, 5.0, 2.0, 7.0])},
        "rope_freqs",
    ),
    "divisors of another size": ({}, {"rope_freqs.weight": np.ones(3)}, "rope_freqs"),
    "divisors of zero": ({}, {"rope_freqs.weight": np.zeros(4)}, "divided"),
    "bias": ({}, {"blk.1.attn_q.bias": np.ones(32)}, "blk.1.attn_q.bias"),
    "unknown tensor": ({}, {"blk.0.attn_sinks.weight": np.ones(4)}, "attn_sinks"),
    "a layer too many": ({}, {"blk.2.ffn_norm.weight": np.ones(32)}, "blk.2.ffn_norm"),
    "a tensor is missing": ({}, {"blk.1.ffn_up.weight": None}, "layers.1.mlp.up_proj"),
    "no embedding": ({}, {"token_embd.weight": None}, "embed_tokens"),
    "another shape": ({}, {"blk.1.ffn_up.weight": np.ones((47, 32))}, "x.gguf"),
}


@pytest.mark.parametrize("case", NOT_ALL_USED)
def test_what_is_not_used_is_named(llama, tmp_path, case):
    """A key or tensor that would not be in the model, and a parameter that would be random."""
    keys, tensors, word = NOT_ALL_USED[case]
    file = llama(keys=keys, tensors=tensors)
    with pytest.raises(InputError) as refused:
        import_gguf(file, tmp_path / "out")
    assert word in str(refused.value)
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_what_may_be_there(llama, tmp_path):
    """Keys that change nothing, and those that agree with the rest, do no harm."""
    keys = {
        "general.name": "x",
        "general.license": "y",
        "quantize.imatrix.file": "z",
        "llama.vocab_size": 120,
        "llama.attention.key_length": 8,
        "llama.rope.scaling.finetuned": True,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 2,
        "tokenizer.ggml.fim_pad_token_id": 7,
    }
    import_gguf(llama(keys=keys), tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 5]


def test_keys_of_a_family_with_two_kinds_of_layers():
    """What transformers makes of the keys of Qwen3.5 agrees with them; and where it would not, that
    is told.
    """
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_config_mapping")
    values = {
        "block_count": 5, "nextn_predict_layers": 1, "context_length": 512,
        "embedding_length": 64, "feed_forward_length": 96, "full_attention_interval": 4,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
        "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6, "rope.dimension_count": 8, "ssm.conv_kernel": 4,
        "rope.dimension_sections": (2, 1, 1, 0), "ssm.state_size": 16, "ssm.group_count": 2,
        "ssm.time_step_rank": 4, "ssm.inner_size": 64,
    }  # fmt: skip
    metadata = {"general.architecture": "qwen35"}
    metadata |= {f"qwen35.{name}": value for name, value in values.items()}
    stated = mapping.get_gguf_config({**metadata, "tokenizer.ggml.tokens": 120}, ())
    config = AutoConfig.for_model(**stated)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_keys(GGUFHeader(Path("x"), metadata, {}))
    check_config(GGUFHeader(Path("x"), metadata, {}), model)
    for name in ("ssm.inner_size", "rope.dimension_sections", "block_count", "ssm.state_size"):
        changed = {**metadata, f"qwen35.{name}": 99}
        with pytest.raises(UnsupportedError, match=name):
            check_config(GGUFHeader(Path("x"), changed, {}), model)
