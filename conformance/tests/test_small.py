"""Configs made small keep what they say, in other sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from power import outcomes

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3MoeAdapter, Qwen3NextAdapter, Qwen35Adapter
from ollm_conformance import AdapterConformance
from ollm_conformance.adapter.configs import with_rope
from ollm_conformance.layer_cut import with_layers
from ollm_conformance.models import meta_model, random_model
from ollm_conformance.small import LAYERS, make_small
from ollm_conformance.small_catalog import small_catalog
from ollm_conformance.unstated import shortened
from ollm_core import catalog_entry

ENTRIES = [
    entry
    for adapter in (LlamaAdapter, GptOssAdapter, Qwen3NextAdapter, Qwen3MoeAdapter)
    for entry in adapter().catalog()
]


@st.composite
def configs(draw):
    """Configs whose heads, widths, layers and experts stand in any relation."""
    kv_heads, group = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    heads, dim = kv_heads * group, draw(st.sampled_from([64, 80, 128, 256]))
    layers, period = draw(st.integers(1, 70)), draw(st.integers(1, 8))
    config = {
        "hidden_size": draw(st.sampled_from([heads * dim, 2048, 5120])),
        "head_dim": dim,
        "intermediate_size": draw(st.sampled_from([1024, 2048, 5120, 11008])),
        "layer_types": [f"kind-{i % period}" for i in range(layers)],
        "max_window_layers": draw(st.integers(0, layers)),
        "mlp_only_layers": sorted(draw(st.sets(st.integers(0, layers - 1), max_size=3))),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rope_theta": 10000.0,
        "sliding_window": draw(st.sampled_from([None, 128, 4096])),
        "vocab_size": 150_000,
    }
    if draw(st.booleans()):
        experts = draw(st.integers(1, 512))
        config |= {"num_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}
    return config


def order(one, other):
    """-1, 0 or 1."""
    return (one > other) - (one < other)


def layer_kinds(config):
    """What the lists say of each layer."""
    return [
        (kind, i in config["mlp_only_layers"], i >= config["max_window_layers"])
        for i, kind in enumerate(config["layer_types"])
    ]


@settings(max_examples=200, deadline=None)
@given(configs())
def test_relations_are_kept(config):
    """Heads in their ratio, widths in their order, every kind of layer, and the rest as it was."""
    before = copy.deepcopy(config)
    small = make_small(config)
    assert config == before
    assert small.keys() == config.keys()
    for one in (config, small):
        one["width"] = one["num_attention_heads"] * one["head_dim"]
    ratio, wanted = (c["num_attention_heads"] // c["num_key_value_heads"] for c in (small, config))
    assert ratio == wanted
    for one, other in (("hidden_size", "width"), ("intermediate_size", "hidden_size")):
        assert order(small[one], small[other]) == order(config[one], config[other])
    assert set(layer_kinds(small)) == set(layer_kinds(config))
    assert small["num_hidden_layers"] == len(small["layer_types"])
    assert small["num_hidden_layers"] >= min(LAYERS, config["num_hidden_layers"])
    assert (small["sliding_window"] is None) == (config["sliding_window"] is None)
    assert small["rope_theta"] == config["rope_theta"]
    if "num_experts" in config:
        chosen, experts = small["num_experts_per_tok"], small["num_experts"]
        assert 1 <= chosen <= experts <= config["num_experts"]
        if config["num_experts_per_tok"] > 1:
            assert chosen > 1


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_a_catalog_becomes_small(entry):
    """What is published is a model of a few megabytes then, as transformers builds it."""
    small = make_small(entry.config)
    assert sum(p.numel() for p in meta_model(small).parameters()) < 12_000_000
    assert small["num_hidden_layers"] == LAYERS


def test_packed_numbers_stay_in_groups():
    """Widths of what is packed as mxfp4 are multiples of 32, and square where they were."""
    (entry, _) = GptOssAdapter().catalog()
    small = make_small(entry.config)
    assert small["hidden_size"] == small["intermediate_size"]
    assert small["hidden_size"] % 32 == 0


def test_a_model_that_also_sees_is_small_inside():
    """Its text part is, tokens included; the rest stays."""
    (entry, _) = Qwen3NextAdapter().catalog()
    inner = {**entry.config, "rope_parameters": {"mrope_section": [11, 11, 10], "rope_theta": 1e7}}
    whole = {"image_token_id": 151655, "text_config": inner, "vision_config": {"depth": 27}}
    small = make_small(whole)
    text = small["text_config"]
    assert small["vision_config"] == {"depth": 27}
    assert (text["bos_token_id"], text["eos_token_id"], small["image_token_id"]) == (0, 1, 2)
    section = text["rope_parameters"]["mrope_section"]
    assert sum(section) == text["head_dim"] * 0.25 / 2
    assert min(section) > 0


def test_layers_that_are_named_keep_their_names():
    """They get the numbers that they have among the layers kept."""
    config = {
        "first_k_dense_replace": 3,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 5,
        "mlp_only_layers": [1, 6],
        "num_hidden_layers": 8,
    }
    assert with_layers(config, [0, 1, 4, 6]) == {
        "first_k_dense_replace": 2,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "mlp_only_layers": [1, 3],
        "num_hidden_layers": 4,
    }


def test_alike_entries_are_run_once():
    """Two finetunes of one model are one small model; the first of a family has many layers."""
    (small,) = small_catalog(Qwen3NextAdapter(), {})
    assert small.ids == ("qwen3-next-80B", "qwen3-next-80B-thinking")
    first, *others = small_catalog(LlamaAdapter(), {})
    assert first.config["num_hidden_layers"] == LAYERS
    assert {other.config["num_hidden_layers"] for other in others} == {3}
    with pytest.raises(AssertionError, match="got 'llama9'"):
        small_catalog(LlamaAdapter(), {"llama9": {}})


def test_each_key_is_left_out_once():
    """Those of the rotary part too, and the model type never."""
    config = {"model_type": "x", "rope_parameters": {"factor": 2.0, "rope_type": "yarn"}}
    found = {one.key: one.config for one in shortened(config)}
    assert found == {
        "rope_parameters": {"model_type": "x"},
        "rope_parameters.factor": {"model_type": "x", "rope_parameters": {"rope_type": "yarn"}},
        "rope_parameters.rope_type": {"model_type": "x", "rope_parameters": {"factor": 2.0}},
    }


class Sees(Qwen35Adapter):
    """With an entry whose text is one part of its config, as published."""

    def catalog(self):
        """See ModelAdapter."""
        text = {
            **self.tiny_config(), "num_attention_heads": 24, "num_hidden_layers": 20,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 5,
        }  # fmt: skip
        whole = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False}
        return (
            catalog_entry(
                "sees", "o/n", {**whole, "dtype": "bfloat16"}, num_parameters=1, license="mit"
            ),
        )


def test_a_text_part_is_run_as_published():
    """The config.json that is opened has the text inside."""
    suite = type("TestSees", (AdapterConformance,), {"adapter": Sees})
    checks = ["configs.active", "configs.caches", "configs.small"]
    assert outcomes(suite, checks) == dict.fromkeys(checks, "passed")


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_each_rope_type_changes_something(rope_type):
    """So a run with it shows whether it was heeded."""
    default = with_rope(LlamaAdapter().tiny_config(), "default")
    models = [random_model(one).model for one in (default, with_rope(default, rope_type))]
    frequencies = [model.rotary_emb.inv_freq for model in models]
    assert not torch.equal(*frequencies)
