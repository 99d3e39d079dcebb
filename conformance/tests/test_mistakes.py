"""What the suite says to an author: each of the usual mistakes is one sentence with its fix."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from families import Qwen3Moe
from power import results

from ollm_adapter_llama import LlamaAdapter
from ollm_conformance import AdapterConformance
from ollm_core import Capability, DecoderAdapter, ParameterSource

TINY = LlamaAdapter().tiny_config()
NORM = "input_layernorm.weight"


class Nameless(DecoderAdapter):
    """Has all but a name."""

    model_types = ("llama",)

    def layer_parameters(self, config, layer_idx):
        return LlamaAdapter().layer_parameters(config, layer_idx)

    def tiny_config(self):
        return TINY


def full_names(self, config, layer_idx):
    names = LlamaAdapter().layer_parameters(config, layer_idx)
    return [f"model.layers.{layer_idx}.{name}" for name in names]


def by_absent_key(self, config, layer_idx):
    yield config["no_such_key"]


def transformed(transform):
    """A source() whose projections of queries go through `transform`."""

    def source(self, config, parameter):
        return ParameterSource((parameter,), transform if "q_proj.w" in parameter else None)

    return source


MISTAKES = {
    "leaves in a string": (
        {"layer_parameters": lambda self, config, i: NORM},
        "layer_parameters() of layer 0 must give names, got the str 'input_layernorm.weight'",
        "hint: yield each name, or return a tuple",
    ),
    "leaves not returned": (
        {"layer_parameters": lambda self, config, i: None},
        "layer_parameters() of layer 0 must give names, got None",
        "hint: yield each name",
    ),
    "leaves with the layer's path": (
        {"layer_parameters": full_names},
        "names inside the layer, got the str 'model.layers.0.input_layernorm.weight'",
        "hint: leave out 'model.layers.0.'",
    ),
    "a leaf twice": (
        {"layer_parameters": lambda self, config, i: [NORM, NORM]},
        f"gives '{NORM}' more than once",
        "give each parameter once",
    ),
    "an absent key": (
        {"layer_parameters": by_absent_key},
        "weights() raised KeyError: 'no_such_key'",
        "raised at: {here}, in by_absent_key",
    ),
    "a misspelled path": (
        {
            "layout": lambda self, c: replace(
                LlamaAdapter().layout(c), embedding="model.embed_tokes"
            )
        },
        "layout().embedding is 'model.embed_tokes', and transformers' LlamaForCausalLM has no",
        "hint: did you mean 'model.embed_tokens'?",
    ),
    "a layout not returned": (
        {"layout": lambda self, config: None},
        "layout() must return a Layout, got None",
        "hint: return replace(super().layout(config), ...)",
    ),
    "too few caches": (
        {"caches": lambda self, config: LlamaAdapter().caches(config)[:-1]},
        "adapter llama gives 2 caches, expected 3",
        "one CacheKind for each layer of layout()",
    ),
    "caches not returned": (
        {"caches": lambda self, config: None},
        "caches() must return a sequence of CacheKind objects, got None",
        "hint: return one CacheKind for each layer",
    ),
    "tiny config without model_type": (
        {"tiny_config": lambda self: {k: v for k, v in TINY.items() if k != "model_type"}},
        "tiny_config(): expected a `model_type`, as config.json has it, got None",
        "",
    ),
    "tiny config of no model": (
        {"tiny_config": lambda self: {**TINY, "num_attention_heads": "four"}},
        "tiny_config(): expected a config of which transformers makes a 'llama' model",
        "num_attention_heads",
    ),
    "tiny config not returned": (
        {"tiny_config": lambda self: None},
        "tiny_config(): expected a mapping, got None",
        "",
    ),
    "types in a string": (
        {"model_types": "llama"},
        "model_types must be a tuple of strings, got the str 'llama'",
        "hint: model_types = ('llama',)",
    ),
    "a misspelled capability": (
        {"capabilities": {"dratfs": Capability("unsupported", "for a good reason")}},
        "declares unknown capabilities: 'dratfs'",
        "hint: did you mean 'drafts'? there are batch, ",
    ),
    "a catalog of dicts": (
        {"catalog": lambda self: [{"id": "x"}]},
        "catalog() must give CatalogEntry objects, entry 0 is the dict {'id': 'x'}",
        "hint: make each with catalog_entry(",
    ),
    "weights not returned": (
        {"weights": lambda self, config, names: None},
        "weights() must return a WeightPlan, got None",
        "hint: return super().weights(",
    ),
    "a source of a string": (
        {"source": lambda self, config, name: ParameterSource(name)},
        "tensors must be a tuple of names, got 'model.embed_tokens.weight'",
        "hint: write ParameterSource(('model.embed_tokens.weight',))",
    ),
    "a source of several without a transform": (
        {"source": lambda self, config, name: ParameterSource((name, name))},
        "2 tensors, from 'model.embed_tokens.weight' on, need a transform",
        "torch.cat",
    ),
    "a name for a source": (
        {"source": lambda self, config, name: name},
        "source() of model.embed_tokens.weight must return a ParameterSource, got the str",
        "hint: return ParameterSource((name,))",
    ),
    "experts not returned": (
        {"experts": lambda self, config, name: None},
        "experts() of model.embed_tokens.weight must return ParameterSource objects, got None",
        "hint: return one for each expert, and ()",
    ),
    "a transform that raises": (
        {"source": transformed(lambda tensor: tensor.nope())},
        "parameter model.layers.0.self_attn.q_proj.weight: its transform, given [128, 64], raised",
        "raised at: {here}, in <lambda>",
    ),
    "a transform that returns nothing": (
        {"source": transformed(lambda tensor: None)},
        "q_proj.weight: its transform must return a tensor, got None",
        "hint: look at the ParameterSource that source()",
    ),
    "a transform of another shape": (
        {"source": transformed(lambda tensor: tensor[:3])},
        "q_proj.weight has shape [3, 64] after its transform",
        "or source() of the adapter is wrong",
    ),
    "text_config not returned": (
        {"text_config": lambda self, config: config.get("text_config")},
        "text_config() must return a part of config.json, or all of it, got None",
        "hint: return config",
    ),
}
RAW = re.compile(
    r"found: +(expected no error, got )?(Attribute|Type|Key|Index|Value|Assertion)Error"
)


def told(adapter, capfd):
    """What the suite prints of a check that needs all of an adapter, in one line."""
    suite = type("TestMistaken", (AdapterConformance,), {"adapter": adapter})
    (result,) = results(suite, ["language.stop"])
    assert result.outcome == "failed"
    _, _, said = capfd.readouterr().out.partition("fails check")
    return " ".join(said.split())


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_with_its_fix(case, capfd):
    """Which method, what was expected, what it gave, and what to write; no raw exception."""
    changes, words, fix = MISTAKES[case]
    said = told(type("Mistaken", (LlamaAdapter,), {**changes, "__module__": __name__}), capfd)
    assert not RAW.search(said), said
    assert words in said
    here = re.escape(fix).replace(re.escape("{here}"), r"\S*test_mistakes\.py:\d+")
    assert re.search(here, said), said


def test_an_adapter_without_a_name(capfd):
    """It is called by its class."""
    said = told(Nameless, capfd)
    assert "adapter Nameless: name must be a string, got None" in said
    assert 'hint: give the class a name, for instance name = "llama"' in said


def test_experts_that_are_elsewhere(capfd):
    """The layout's path and what experts() gives do not meet."""
    elsewhere = {"layout": lambda self, c: replace(Qwen3Moe().layout(c), experts="mlp.expert")}
    said = told(type("Mistaken", (Qwen3Moe,), elsewhere), capfd)
    assert "experts are planned for model.layers.0.mlp.experts.down_proj, which is no" in said
    assert "`experts` of layout() must be the path of that module inside a layer" in said
