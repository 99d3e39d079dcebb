"""What families compute outside their layers: done by core, or refused by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import ollm
from ollm_conformance.models import random_model
from ollm_core import DecoderAdapter, Layout, UnsupportedError
from ollm_core.attention.select import ATTENTION_NAME, register_attention
from ollm_core.model.outside_layers import remembering_outside, watch_outside
from ollm_core.plugins.registry import Registry

SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "granite": {
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
    },
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 90},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 90, "layer_types": None},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 90, "layer_types": None},
    "llama": {},
}
OUTSIDE = {  # in float32; Gemma rounds its scale to the weights' dtype
    "granite": "mul(12.0); ; ; div(8.0)",
    "gemma": "mul(torch.float32 8.0); ; ; ",
    "gemma2": "mul(torch.float32 8.0); ; ; div(3.0) tanh() mul(3.0)",
    "gemma3_text": "mul(torch.float32 8.0); ; ; ",
    "cohere": "; ; ; mul(0.25)",
    "cohere2": "; ; ; mul(0.25)",
    "llama": "; ; ; ",
}


class AnyFamily(DecoderAdapter):
    """Whatever parameters transformers' model has: for tests of what core adds to them."""

    name = "any"
    model_types = tuple(FAMILIES)

    def layer_parameters(self, config, layer_idx):
        model = meta_model(config)
        return [name for name, _ in model.model.layers[layer_idx].named_parameters()]

    def layer_types(self, config):
        found = AutoConfig.for_model(**dict(config))
        return getattr(found, "layer_types", None) or super().layer_types(config)

    def tiny_config(self):
        return config_of("llama")


def config_of(family: str, **changes: object) -> dict[str, object]:
    """The config.json of a tiny model, every key stated."""
    found = AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | changes)
    return json.loads(json.dumps(found.to_dict()))


def meta_model(config, **options):
    register_attention()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**dict(config)), attn_implementation=ATTENTION_NAME, **options
        ).eval()


def seen(config, layout: Layout | None = None, **options: object) -> str:
    """What is seen outside the layers of its model."""
    model = meta_model(config, **options)
    layout = layout or Layout(len(model.model.layers))
    kinds = model.config.layer_types if "gemma3" in config["model_type"] else [None] * 3
    return str(watch_outside(model, layout, kinds))


def save(family: str, directory: Path, dtype: torch.dtype) -> Path:
    """A random checkpoint of a family."""
    model = random_model(config_of(family)).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_outside_is_seen(family: str):
    """Every operation with its constants, those of the config at hand."""
    assert seen(config_of(family)) == OUTSIDE[family]


def test_scales_are_rounded_as_the_family_rounds_them():
    """Gemma's in the weights' dtype: the square root of 3072 is 55.5 in bfloat16."""
    config = config_of("gemma2", hidden_size=3072, final_logit_softcapping=None)
    assert seen(config, dtype=torch.bfloat16) == "mul(torch.bfloat16 55.5); ; ; "


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_own(family, dtype, tmp_path, reference, ids):
    """Bit for bit, prompt in chunks and steps, by an adapter that says nothing of it."""
    directory = save(family, tmp_path, dtype)
    expected = reference(directory, dtype, chunk_size=64)
    prompt = ids(150)
    registry = Registry.of(AnyFamily())
    options = {"registry": registry, "chunk_size": 64, "attention": "exact", "kv": "host"}
    with ollm.load(directory, device="cpu", device_memory="4MB", **options) as model:
        cache = model.new_cache()
        logits = model(prompt[None], past_key_values=cache).logits[0]
        assert torch.equal(logits, expected.run(prompt))
        tokens, _ = expected.greedy(prompt, 8)
        found = model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert found[0, 150:].tolist() == tokens


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("nanochat", "gives the norm the embedding"),
        ("llama4_text", "gives layer 0 position_embeddings that are not"),
        ("deepseek_v3", "the buffer model.layers"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(family: str, told: str):
    """In one line, before anything is read."""
    with pytest.raises(UnsupportedError, match=told) as refused:
        seen(AutoConfig.for_model(family).to_dict())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm": "model.layers.0.input_layernorm"}, "gives the head aten.mul.Tensor of layer 2"),
        ({"embedding": "lm_head"}, "gives layer 0 something else"),
        ({"rotary": "model.norm"}, "position"),
        ({"head": "model.layers.0.mlp.gate_proj"}, "does not call the head"),
    ],
)
def test_a_layout_that_names_other_parts_is_refused(changes: dict[str, str], told: str):
    """By the part that is not what it should be."""
    with pytest.raises(UnsupportedError, match=told):
        seen(config_of("llama"), replace(Layout(3), **changes))


def by_length(output, ids):
    """What no constant says."""
    output.last_hidden_state = output.last_hidden_state * ids.shape[1]


def by_position(output, ids):
    """What is not done to each number by itself."""
    output.last_hidden_state = output.last_hidden_state.flip(1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (by_length, "computes by the number of tokens: ; ; mul(3); , and ; ; mul(5); "),
        (by_position, "gives the head aten.flip.default of the norm"),
    ],
)
def test_a_forward_that_does_more_is_refused(more, told: str):
    """A model's own code is followed, whatever its class is called."""
    model = meta_model(config_of("llama"))
    own = model.model.forward

    def forward(**options):
        output = own(**options)
        more(output, options["input_ids"])
        return output

    model.model.forward = forward
    with pytest.raises(UnsupportedError, match=re.escape(told)):
        watch_outside(model, Layout(3), [None] * 3)


def test_what_was_seen_is_remembered_for_tests():
    """Of one config, dtype and layout alone; outside of the block a model is watched again."""
    known: dict = {}
    config = config_of("granite")
    other = {**config, "embedding_multiplier": 3.0}
    with remembering_outside(known):
        assert seen(config) == seen(config) == OUTSIDE["granite"]
        assert len(known) == 1
        assert seen(other) == "mul(3.0); ; ; div(8.0)"
        assert seen(config, dtype=torch.bfloat16) == OUTSIDE["granite"]
        assert len(known) == 3
        known[next(iter(known))] = "what it was told"
        assert seen(config) == "what it was told"
    assert seen(config) == OUTSIDE["granite"]
