"""A family whose layers cap their attention logits, as Gemma 2: exact attention or a refusal, never
other tokens.
"""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

import ollm
from ollm_conformance.models import random_model
from ollm_core import Capability, DecoderAdapter, UnsupportedError
from ollm_core.plugins.registry import Registry

CONFIG = {
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": None,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_types": ["sliding_attention", "full_attention"],
    "model_type": "gemma2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 24,
    "sliding_window": 90,
    "tie_word_embeddings": True,
    "vocab_size": 256,
}


class Undeclared(DecoderAdapter):
    """Says nothing of the caps."""

    name = "gemma2"
    model_types = ("gemma2",)

    def layer_parameters(self, config, layer_idx):
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{norm}_layernorm.weight"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield f"mlp.{leaf}.weight"

    def tiny_config(self):
        return CONFIG


class Declared(Undeclared):
    """Says that block-wise attention cannot."""

    capabilities = MappingProxyType(
        {"blockwise-attention": Capability("unsupported", "its attention logits are soft-capped")}
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Gemma 2."""
    directory = tmp_path_factory.mktemp("gemma2")
    random_model(CONFIG).save_pretrained(directory)
    return directory


def test_declared_is_exact_at_any_length(checkpoint, reference, ids):
    """By default each logit is transformers', and block-wise attention is refused at opening."""
    registry = Registry.of(Declared())
    with ollm.load(checkpoint, device="cpu", chunk_size=64, registry=registry) as model:
        found = model(input_ids=ids(300)[None]).logits[0]
        assert model.stats.attention == "exact"
    assert torch.equal(found, reference(checkpoint, torch.float32).run(ids(300), 64))
    with pytest.raises(UnsupportedError, match="soft-capped"):
        ollm.load(checkpoint, device="cpu", attention="blockwise", registry=registry)


@pytest.mark.parametrize("attention", ["auto", "blockwise"])
def test_undeclared_is_refused_where_it_would_be_wrong(checkpoint, ids, attention):
    """Before a pass begins, by the option's name; an exact run has none of it."""
    with ollm.load(
        checkpoint, device="cpu", attention=attention, registry=Registry.of(Undeclared())
    ) as model:
        with pytest.raises(UnsupportedError, match="'softcap' that Gemma2Attention") as refused:
            model(input_ids=ids(300)[None])
        assert "declares blockwise-attention unsupported" in refused.value.hint
        assert model.stats.weight_passes == 0
    with ollm.load(
        checkpoint, device="cpu", precision="exact", registry=Registry.of(Undeclared())
    ) as model:
        model(input_ids=ids(90)[None])
        assert model.stats.attention == "exact"
