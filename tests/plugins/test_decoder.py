"""The base for decoder families, held against transformers' own models on the meta device."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ollm
from ollm_core import (
    CheckpointError,
    ConfigError,
    DecoderAdapter,
    ParameterSource,
    UnsupportedError,
    catalog_entry,
    hookimpl,
)
from ollm_core.plugins.registry import Registry

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
ATTENTION = tuple(f"self_attn.{p}_proj.weight" for p in "qkvo")
MLP = tuple(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down"))
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
POST_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


class Family(DecoderAdapter):
    """A family in one line: what its layers hold, and what its config class assumes."""

    model_types = ("any",)

    def __init__(self, name, leaves, **defaults):
        self.name = name
        self.leaves = leaves
        self.defaults = defaults

    def layer_parameters(self, config, layer_idx):
        return self.leaves

    def tiny_config(self):
        return {**BASE, "model_type": self.name}


FAMILIES = {
    "mistral": (
        Family("mistral", ATTENTION + MLP + NORMS, sliding_window=4096, num_key_value_heads=8),
        [{}, {"sliding_window": None}, {"num_key_value_heads": 4, "head_dim": 16}],
    ),
    "qwen3": (
        Family(
            "qwen3",
            ATTENTION + MLP + NORMS + QK_NORMS,
            head_dim=128,
            sliding_window=4096,
            use_sliding_window=False,
            max_window_layers=28,
        ),
        [
            {},
            {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
            {"use_sliding_window": True, "max_window_layers": 0},
            {"tie_word_embeddings": True, "head_dim": 24},
        ],
    ),
    "olmo2": (
        Family("olmo2", ATTENTION + MLP + POST_NORMS + QK_NORMS),
        [{}, {"num_key_value_heads": None}],
    ),
    "gemma2": (
        Family(
            "gemma2",
            ATTENTION + MLP + POST_NORMS + (NORMS[0], "pre_feedforward_layernorm.weight"),
            tie_word_embeddings=True,
            head_dim=256,
            sliding_window=4096,
            layer_types=("sliding_attention", "full_attention") * 2,
        ),
        [{}, {"layer_types": ["full_attention"] * 4}, {"sliding_window": 5}],
    ),
    "phi3": (
        Family(
            "phi3",
            (
                "self_attn.qkv_proj.weight",
                "self_attn.o_proj.weight",
                "mlp.gate_up_proj.weight",
                MLP[-1],
                *NORMS,
            ),
        ),
        [{}],
    ),
}
CASES = [(name, changes) for name, (_, variants) in FAMILIES.items() for changes in variants]


def build(config):
    """The transformers model of a config, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))


def family(name, **changes):
    adapter, _ = FAMILIES[name]
    return adapter, {**adapter.tiny_config(), **changes}


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_declarations_match_transformers(name, changes):
    """Parameters, module paths, heads, windows and defaults are those of the transformers model."""
    adapter, config = family(name, **changes)
    model = build(config)
    layout = adapter.layout(config)
    names = set(model.state_dict())
    tied = model.config.tie_word_embeddings
    stored = names - {"lm_head.weight"} if tied else names
    plan = adapter.weights(config, stored)
    assert plan.parameters.keys() == names
    assert {tensor for source in plan.parameters.values() for tensor in source.tensors} == stored
    assert len(model.get_submodule(layout.layers)) == layout.num_layers == 4
    for path in (layout.embedding, layout.norm, layout.head, layout.rotary):
        model.get_submodule(path)
    types = getattr(model.config, "layer_types", None)
    if types is None:
        types = [
            "sliding_attention"
            if getattr(model.config, "sliding_window", None)
            else "full_attention"
        ] * 4
    for kind, layer_type in zip(adapter.caches(config), types, strict=True):
        attention = model.model.layers[0].self_attn
        assert f"{kind.kind}_attention" == layer_type
        assert kind.window == (model.config.sliding_window if kind.kind == "sliding" else None)
        assert kind.head_dim == attention.head_dim
        assert kind.num_kv_heads == model.config.num_key_value_heads
    mixers = tuple(kind.kind for kind in adapter.caches(config))
    assert layout.mixers == (mixers if "sliding" in mixers else ())


@pytest.mark.parametrize(
    ("name", "changes", "error", "words"),
    [
        ("mistral", {"sliding_window": 0}, ConfigError, "sliding_window"),
        ("mistral", {"sliding_window": "8"}, ConfigError, "sliding_window"),
        ("mistral", {"layer_types": "full"}, ConfigError, "layer_types"),
        ("mistral", {"layer_types": ["full_attention"]}, ConfigError, "a list of 4"),
        ("mistral", {"layer_types": 7}, ConfigError, "layer_types"),
        ("mistral", {"layer_types": ["a\nb"] * 4}, UnsupportedError, "layer 0 of type"),
        ("mistral", {"layer_types": [["full_attention"]] * 4}, UnsupportedError, "layer 0"),
        ("mistral", {"layer_types": ["chunked_attention"] * 4}, UnsupportedError, "chunked"),
        (
            "qwen3",
            {"use_sliding_window": True, "max_window_layers": -1},
            ConfigError,
            "max_window_layers",
        ),
        (
            "olmo2",
            {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
            UnsupportedError,
            "longest position",
        ),
        ("olmo2", {"rope_parameters": {"x": {"rope_type": "new"}}}, ConfigError, "rope_type"),
    ],
)
def test_hostile_config_is_refused(name, changes, error, words):
    """A window, layer type or rope that makes no sense is one line that names it."""
    adapter, config = family(name, **changes)
    for declaration in (adapter.layout, lambda config: adapter.weights(config, ())):
        with pytest.raises(error, match=words) as refused:
            declaration(config)
        assert "\n" not in str(refused.value)


def test_wrong_names_are_told_both_ways():
    """Of a checkpoint with other names, one that lacks and one that is foreign are shown."""
    adapter, config = family("olmo2")
    names = {name.replace("feedforward", "mlp") for name in build(config).state_dict()}
    with pytest.raises(CheckpointError) as refused:
        adapter.weights(config, names)
    assert "lacks tensor model.layers.0.post_feedforward_layernorm.weight (4 " in str(refused.value)
    assert "has 'model.layers.0.post_mlp_layernorm.weight', which no olmo2" in str(refused.value)


class Renamed(Family):
    """A tree, names and a fused tensor of its own."""

    def layout(self, config):
        return replace(super().layout(config), norm="model.final_norm", head="out")

    def source(self, config, parameter):
        if parameter.endswith(".gate_proj.weight"):
            return ParameterSource(
                (parameter.replace("gate_proj", "gate_up"),), lambda tensor: tensor.chunk(2)[0]
            )
        return ParameterSource((f"language_model.{parameter}",))

    def ignores(self, config, tensor):
        return tensor.startswith("vision.")


def test_overridden_names():
    """Renames, fused tensors, other paths and known superfluous tensors need one method each."""
    adapter = Renamed("renamed", ("mlp.gate_proj.weight",), tie_word_embeddings=True)
    config = {**BASE, "num_hidden_layers": 1}
    embedding = "language_model.model.embed_tokens.weight"
    gate = "model.layers.0.mlp.gate_up.weight"
    ignored = {"vision.x", "language_model.out.weight", "a.rotary_emb.inv_freq"}
    present = {embedding, gate, "language_model.model.final_norm.weight", *ignored}
    plan = adapter.weights(config, present)
    assert plan.ignored == ignored
    assert plan.parameters["out.weight"].tensors == (embedding,)
    assert plan.parameters["model.layers.0.mlp.gate_proj.weight"].tensors == (gate,)
    with pytest.raises(CheckpointError, match=r"'audio\.x'"):
        adapter.weights(config, present | {"audio.x"})


def test_catalog_entry_counts_bytes_and_copies():
    """The bytes follow from the dtype; the config given is not the one handed out."""
    config = {"dtype": "float32", "rope_parameters": {"rope_theta": 1e4}}
    entry = catalog_entry("tiny", "a/tiny", config, num_parameters=10, license="mit")
    assert (entry.weight_bytes, entry.license, entry.chat) == (40, "mit", True)
    entry.config["rope_parameters"]["rope_theta"] = 0
    assert config["rope_parameters"]["rope_theta"] == 1e4
    with pytest.raises(ConfigError, match="int3"):
        catalog_entry("t", "a/t", {"torch_dtype": "int3"}, num_parameters=1, license="")


class Nested(Family):
    """A language model inside the config of something larger."""

    model_types = ("tiny_vlm",)

    def text_config(self, config):
        return config["text_config"]


def test_text_config_is_what_everything_is_built_from(tiny, reference, ids, monkeypatch):
    """A model whose config.json nests the language model opens, and its logits are bitwise."""
    expected = reference(tiny, torch.float32).run(ids(50), 16)
    path = tiny / "config.json"
    text = json.loads(path.read_text())
    text.pop("dtype")
    path.write_text(json.dumps({"model_type": "tiny_vlm", "dtype": "float32", "text_config": text}))

    class Plugin:
        @hookimpl
        def ollm_adapters(self):
            return [Nested("nested", ATTENTION + MLP + NORMS)]

    entry_point = EntryPoint("nested", "nested_plugin:plugin", "ollm.adapters")
    monkeypatch.setitem(sys.modules, "nested_plugin", SimpleNamespace(plugin=Plugin()))
    registry = Registry.discover([entry_point])
    with ollm.load(
        tiny, device="cpu", chunk_size=16, attention="exact", registry=registry
    ) as model:
        assert torch.equal(model(input_ids=ids(50)[None]).logits[0], expected)
