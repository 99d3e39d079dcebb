"""The Llama declaration against transformers' own model, on the meta device."""

import copy
from importlib.metadata import entry_points

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ollm_adapter_llama import LlamaAdapter
from ollm_core import CheckpointError, ConfigError, UnsupportedError
from ollm_core.testing import Registry

ADAPTER = LlamaAdapter()
LLAMA3_ROPE = ADAPTER.tiny_config()["rope_scaling"]


def config_with(**changes):
    return {**ADAPTER.tiny_config(), **changes}


def build(config):
    """The transformers model of a config, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))


def stored_names(config):
    """The names that a checkpoint of this config holds: a tied head is saved once."""
    names = set(build(config).state_dict())
    return names - {"lm_head.weight"} if config["tie_word_embeddings"] else names


def test_entry_point_is_found():
    """The installed distribution registers the adapter for model_type llama."""
    found = entry_points(group="ollm.adapters", name="llama")
    assert [entry_point.dist.name for entry_point in found] == ["ollm-adapter-llama"]
    registry = Registry.discover(found)
    assert registry.adapter_for({"model_type": "llama"}).name == "llama"
    assert [plugin.status for plugin in registry.plugins] == ["ok"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_weights_cover_the_model_exactly(tied, attention_bias, mlp_bias):
    """Every parameter has a source and every stored tensor a use, with and without biases."""
    config = config_with(tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias)
    names = stored_names(config)
    plan = ADAPTER.weights(config, names)
    assert plan.parameters.keys() == set(build(config).state_dict())
    assert {tensor for source in plan.parameters.values() for tensor in source.tensors} == names
    assert not plan.ignored
    for name, source in plan.parameters.items():
        tied_head = tied and name == "lm_head.weight"
        assert source.tensors == ("model.embed_tokens.weight" if tied_head else name,)
        assert source.transform is None


def test_layout_names_modules_of_the_model():
    """Each path of the layout leads to a module, and the rotary module can be made anew."""
    config = ADAPTER.tiny_config()
    layout = ADAPTER.layout(config)
    model = build(config)
    assert len(model.get_submodule(layout.layers)) == layout.num_layers == 3
    for path in (layout.embedding, layout.norm, layout.head):
        assert model.get_submodule(path).weight.is_meta
    assert model.get_submodule(layout.rotary).rope_type == "llama3"


def test_caches_match_the_model():
    """Every layer keeps all tokens, in as many heads of as many numbers as its keys have."""
    config = ADAPTER.tiny_config()
    kinds = ADAPTER.caches(config)
    attention = build(config).model.layers[0].self_attn
    assert len(kinds) == 3
    assert {kind.kind for kind in kinds} == {"full"}
    assert kinds[0].num_kv_heads * kinds[0].head_dim == attention.k_proj.out_features
    assert kinds[0].head_dim == attention.head_dim


def test_defaults_are_those_of_transformers():
    """Without head_dim, num_key_value_heads and tying, the same values hold as in transformers."""
    config = config_with(num_key_value_heads=None)
    del config["head_dim"], config["tie_word_embeddings"]
    known = AutoConfig.for_model(**copy.deepcopy(config))
    (kind, *_) = ADAPTER.caches(config)
    assert (kind.num_kv_heads, kind.head_dim) == (known.num_key_value_heads, known.head_dim)
    plan = ADAPTER.weights(config, set(build(config).state_dict()))
    assert plan.parameters["lm_head.weight"].tensors == ("lm_head.weight",)


def test_superfluous_tensors_are_ignored():
    """A stored head of a tied model and the frequencies in old files are listed as ignored."""
    config = config_with(tie_word_embeddings=True)
    extra = {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    plan = ADAPTER.weights(config, stored_names(config) | extra)
    assert plan.ignored == extra
    assert plan.parameters["lm_head.weight"].tensors == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(
    "foreign", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.qweight", "x\ny"]
)
def test_foreign_tensor_is_refused(foreign):
    """A tensor that no Llama has, or of a layer too many, is named."""
    config = ADAPTER.tiny_config()
    with pytest.raises(CheckpointError) as caught:
        ADAPTER.weights(config, stored_names(config) | {foreign})
    assert ascii(foreign) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "missing", ["lm_head.weight", "model.norm.weight", "model.layers.2.self_attn.q_proj.bias"]
)
def test_missing_tensor_is_refused(missing):
    """A tensor that the config asks for and the checkpoint lacks is named."""
    config = ADAPTER.tiny_config()
    with pytest.raises(CheckpointError, match=missing):
        ADAPTER.weights(config, stored_names(config) - {missing})


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("inner", ["type", "rope_type"])
def test_position_dependent_rope_is_refused(rope_type, key, inner):
    """Frequencies that depend on the longest position are refused, with that reason."""
    config = config_with(rope_scaling=None)
    config[key] = {inner: rope_type, "factor": 2.0}
    with pytest.raises(UnsupportedError, match="depend on the longest position"):
        ADAPTER.layout(config)


@pytest.mark.parametrize(
    "rope",
    [
        None,
        {},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        LLAMA3_ROPE,
        {"rope_type": "default"},
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_rope_is_accepted(rope, key):
    """The types with fixed frequencies open, written as transformers 4 or 5 does."""
    config = config_with(rope_scaling=None)
    config[key] = rope if key == "rope_scaling" or not rope else {**rope, "rope_theta": 1e4}
    assert ADAPTER.layout(config).num_layers == 3
    rotary = build(config).model.rotary_emb
    assert rotary.rope_type == (
        (rope or {}).get("rope_type") or (rope or {}).get("type", "default")
    )


@pytest.mark.parametrize("rope", ["llama3", [1], {"rope_type": "new"}, {"rope_type": ["llama3"]}])
def test_unknown_rope_is_refused(rope):
    """A rope type that is not known, or no object, is a ConfigError."""
    with pytest.raises(ConfigError, match="rope"):
        ADAPTER.layout(config_with(rope_scaling=rope))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


@pytest.mark.parametrize("key", SIZES + HEADS)
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", [4], 1 << 40, float("nan")])
def test_hostile_number_is_refused(key, value):
    """A size that is not a positive integer of sane magnitude is a ConfigError that names it."""
    with pytest.raises(ConfigError, match=key):
        ADAPTER.layout(config_with(**{key: value}))


@pytest.mark.parametrize("key", [*SIZES, "num_attention_heads"])
def test_missing_number_is_refused(key):
    """A config without one of its sizes is a ConfigError that names it."""
    config = ADAPTER.tiny_config()
    del config[key]
    with pytest.raises(ConfigError, match=key):
        ADAPTER.layout(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"num_attention_heads": 2, "num_key_value_heads": 4},
        {"hidden_size": 66, "head_dim": None},
    ],
)
def test_numbers_that_do_not_divide_are_refused(changes):
    """Query heads must share key-value heads evenly, and the hidden size the heads."""
    with pytest.raises(ConfigError, match="a multiple of"):
        ADAPTER.layout(config_with(**changes))


@pytest.mark.parametrize("entry", ADAPTER.catalog(), ids=lambda entry: entry.id)
def test_catalog_sizes_are_those_of_the_model(entry):
    """Parameters and bytes are what transformers counts in the model of that config."""
    model = build(entry.config)
    assert entry.num_parameters == sum(p.numel() for p in model.parameters())
    assert entry.weight_bytes == entry.num_parameters * 2
    assert ADAPTER.layout(entry.config).num_layers == len(model.model.layers)
    assert entry.repo.count("/") == 1
    assert entry.chat


def test_catalog_is_new_at_every_call():
    """What a caller does to a config does not reach the next caller."""
    ADAPTER.catalog()[0].config["rope_scaling"]["factor"] = 0
    assert ADAPTER.catalog()[0].config["rope_scaling"]["factor"] == 32.0
