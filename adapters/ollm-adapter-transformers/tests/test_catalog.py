"""The catalog: every config is of a type that transformers has, and every size is the true one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from ollm_adapter_transformers import ollm_catalog
from ollm_adapter_transformers.catalog import read

ENTRIES = ollm_catalog()
KNOWN = [entry for entry in ENTRIES if entry.config]
SHOWN_IN = 80
"""Columns of a terminal."""


def on_meta(config) -> PreTrainedModel:
    """transformers' model of a config.json, without weights. No code of its author runs."""
    settings = {name: value for name, value in config.items() if name != "quantization_config"}
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(made, trust_remote_code=False)


def test_the_wanted_are_there():
    """Thirty models and more, of the families that people ask for."""
    assert len(ENTRIES) >= 50
    assert len(KNOWN) >= 25
    families = (
        "llama3. llama4 qwen2.5 qwen3- qwen3-coder qwen3.5 mistral mixtral gemma2 gemma3 phi glm4 "
        "deepseek-v3 deepseek-r1 olmo granite smol kimi minimax"
    )
    for family in families.split():
        assert any(entry.id.startswith(family) for entry in ENTRIES), family


def test_names_are_distinct_and_short():
    """No two models have a name in common, and a name and its alias leave room in a terminal."""
    names = Counter(
        name.casefold() for entry in ENTRIES for name in (entry.id, entry.repo, *entry.aliases)
    )
    assert [name for name, times in names.items() if times > 1] == []
    for entry in ENTRIES:
        assert entry.aliases, entry.id
        assert len(entry.id) + len(entry.aliases[0]) <= SHOWN_IN - 35


@pytest.mark.parametrize(("base", "model"), list(read()), ids=lambda one: one.get("id", "base"))
def test_a_config_has_its_source(base, model):
    """What is known for certain says from where; what is not leaves all of it to the hub."""
    if "config" in model:
        assert model["source"]
        assert {**base, **model["config"]}["model_type"]
        assert model["num_parameters"] > 0
    else:
        assert not {"source", "num_parameters", "weight_bytes"} & model.keys()


@pytest.mark.parametrize("entry", KNOWN, ids=lambda entry: entry.id)
def test_sizes_are_true(entry):
    """Parameters and bytes are those of transformers' own model of the config."""
    model = on_meta(entry.config)
    assert entry.num_parameters == sum(one.numel() for one in model.parameters())
    if "quantization_config" in entry.config:
        assert entry.weight_bytes == 0  # its form is not in the config
    else:
        assert entry.config.get("torch_dtype", entry.config.get("dtype")) == "bfloat16"
        assert entry.weight_bytes == 2 * entry.num_parameters


def test_new_objects_at_every_call():
    """What somebody does to a config does not reach the next caller."""
    entry = next(one for one in ollm_catalog() if "rope_scaling" in one.config)
    entry.config["rope_scaling"] = None
    entry.config.pop("model_type")
    again = next(one for one in ollm_catalog() if one.id == entry.id)
    assert again.config["model_type"]
