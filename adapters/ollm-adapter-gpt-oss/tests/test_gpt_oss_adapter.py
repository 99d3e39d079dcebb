"""The gpt-oss declaration against transformers' own model and the published checkpoints."""

from importlib.metadata import entry_points

import pytest
import torch

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_conformance.forms import as_published
from ollm_conformance.models import meta_model
from ollm_core import ConfigError, UnsupportedError
from ollm_core.testing import Registry, described_tensors

ADAPTER = GptOssAdapter()


def config_with(**changes):
    return {**ADAPTER.tiny_config(), **changes}


def without(*keys):
    return {key: value for key, value in ADAPTER.tiny_config().items() if key not in keys}


def test_entry_point_is_found():
    """The installed distribution registers the adapter for model_type gpt_oss."""
    found = entry_points(group="ollm.adapters", name="gpt-oss")
    assert [entry_point.dist.name for entry_point in found] == ["ollm-adapter-gpt-oss"]
    assert Registry.discover(found).adapter_for({"model_type": "gpt_oss"}).name == "gpt-oss"


@pytest.mark.parametrize("entry", ADAPTER.catalog(), ids=lambda entry: entry.id)
def test_catalog_bytes_are_those_of_the_packed_tensors(entry):
    """Blocks and scales are bytes, all else is bfloat16; a plan without files takes them so."""
    model = meta_model(entry.config).to(torch.bfloat16)
    stored = as_published(entry.config, {name: p.data for name, p in model.named_parameters()})
    assert sum(tensor.nbytes for tensor in stored.values()) == entry.weight_bytes
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    dtypes = {torch.uint8: "U8", torch.bfloat16: "BF16"}
    assert described_tensors(ADAPTER, entry.config, shapes, "BF16") == {
        name: (dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()
    }


def test_windows_alternate():
    """As listed; without a list every other layer is sliding, the first one included."""
    for config in (ADAPTER.tiny_config(), without("layer_types")):
        kinds = [(cache.kind, cache.window) for cache in ADAPTER.caches(config)]
        assert kinds == [("sliding", 100), ("full", None), ("sliding", 100)]
        assert ADAPTER.layout(config).mixers == ("sliding", "full", "sliding")


@pytest.mark.parametrize(
    "key",
    ["attention_bias", "head_dim", "num_key_value_heads", "num_local_experts", "sliding_window"],
)
def test_defaults_are_those_of_transformers(key):
    """A key that config.json lacks is what transformers takes for it."""
    config = {**without(key), "num_attention_heads": 8}
    model = meta_model({**config, "quantization_config": None})
    assert ADAPTER.defaults[key] == getattr(model.config, key)
    names = {name for name, _ in model.named_parameters()}
    plan = ADAPTER.weights({**config, "quantization_config": None}, names)
    assert plan.parameters.keys() | plan.experts.keys() == names


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size"])
def test_packed_sizes_are_multiples_of_a_block(key):
    """Sizes that cannot be packed are refused before any tensor is looked at."""
    with pytest.raises(ConfigError, match=f"{key} must be a multiple of 32"):
        ADAPTER.weights(config_with(**{key: 80}), ())


@pytest.mark.parametrize("found", ["mxfp4", 3, [], {"quant_method": ["mxfp4"]}])
def test_odd_quantisation_is_refused(found):
    """Whatever quantization_config is, it is mxfp4 or one clear line."""
    with pytest.raises((ConfigError, UnsupportedError), match=r"config\.json: quant") as refused:
        ADAPTER.layout(config_with(quantization_config=found))
    assert "\n" not in str(refused.value)
