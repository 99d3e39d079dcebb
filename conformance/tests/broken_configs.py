"""Adapters whose tiny config hides what is wrong with them: sizes, flags and words of published
configs, keys that are left out, and rotary embeddings that no config here has.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

from broken import broken_adapter
from families import Gemma2, Qwen3

from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3MoeAdapter, Qwen3NextAdapter
from ollm_conformance.small import make_small
from ollm_core import ConfigError, ParameterSource, catalog_entry

_LARGE = LlamaAdapter().catalog()[0].config


def _entry(config):
    return catalog_entry("published", "owner/name", config, num_parameters=1, license="mit")


class TieAssumed(LlamaAdapter):
    defaults = MappingProxyType({"tie_word_embeddings": True})


class HeadDimFromHiddenSize(Qwen3):
    defaults = MappingProxyType({k: v for k, v in Qwen3.defaults.items() if k != "head_dim"})


class NoKVHeadsAssumed(Qwen3MoeAdapter):
    defaults = MappingProxyType({})


class WindowOf4096Assumed(GptOssAdapter):
    defaults = MappingProxyType({**GptOssAdapter.defaults, "sliding_window": 4096})


class NoBiasAssumed(GptOssAdapter):
    defaults = MappingProxyType({**GptOssAdapter.defaults, "attention_bias": False})


class RopeThetaOfLlama3Assumed(LlamaAdapter):
    def text_config(self, config):
        if "rope_theta" in config or "rope_theta" in config.get("rope_parameters", {}):
            return config
        rope = {**(config.get("rope_parameters") or {}), "rope_theta": 500000.0}
        return {**config, "rope_parameters": rope}


class EpsilonAssumed(LlamaAdapter):
    def text_config(self, config):
        return {"rms_norm_eps": 1e-5, **config}


class LayerTypesDemanded(GptOssAdapter):
    def layer_types(self, config):
        if config.get("layer_types") is None:
            raise ConfigError("config.json: layer_types must be a list")
        return super().layer_types(config)


class EveryLayerSlidesUnlessListed(Gemma2):
    def layer_types(self, config):
        return super(Gemma2, self).layer_types(config)


class UntiedUnlessStated(Gemma2):
    defaults = MappingProxyType(
        {key: value for key, value in Gemma2.defaults.items() if key != "tie_word_embeddings"}
    )


class SoftCapNotDeclared(Gemma2):
    @property
    def capabilities(self):
        return {}


class FlagDemanded(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        return super().layer_parameters({**config, "mlp_bias": config["mlp_bias"]}, layer_idx)


class AllLayersFullUnlessListed(Qwen3NextAdapter):
    def layer_types(self, config):
        if config.get("layer_types") is None:
            return ["full_attention"] * config["num_hidden_layers"]
        return super().layer_types(config)


class TwoQueryHeadsAtMost(LlamaAdapter):
    def caches(self, config):
        heads = config["num_attention_heads"] // 2
        return [
            replace(kind, num_kv_heads=max(kind.num_kv_heads, heads))
            for kind in super().caches(config)
        ]


class SixteenLayersAtMost(LlamaAdapter):
    def caches(self, config):
        return super().caches(config)[:16]


class WindowOfTheTinyOne(GptOssAdapter):
    def caches(self, config):
        return [replace(k, window=k.window and min(k.window, 100)) for k in super().caches(config)]


class PatternOfThreeLayers(GptOssAdapter):
    def caches(self, config):
        window = config["sliding_window"]
        return [
            replace(kind, kind="full", window=None)
            if i == 1
            else replace(kind, kind="sliding", window=window)
            for i, kind in enumerate(super().caches(config))
        ]


class SquareTurned(LlamaAdapter):
    """Right where transposing it is an error."""

    def source(self, config, parameter):
        source = super().source(config, parameter)
        heads, dim = config["num_attention_heads"], config.get("head_dim")
        square = heads * (dim or config["hidden_size"] // heads) == config["hidden_size"]
        if square and parameter.endswith("o_proj.weight"):
            return replace(source, transform=self.turned)
        return source

    @staticmethod
    def turned(tensor):
        return tensor.T


class LayersSortedAsWords(LlamaAdapter):
    """As file systems list them: 0, 1, 10, 11, 2."""

    def source(self, config, parameter):
        found = re.search(r"\.layers\.(\d+)\.", parameter)
        if not found:
            return super().source(config, parameter)
        order = sorted(range(config["num_hidden_layers"]), key=str)
        tensor = parameter.replace(found[0], f".layers.{order[int(found[1])]}.")
        return ParameterSource((tensor,))


class ExpertsSortedAsWords(GptOssAdapter):
    def experts(self, config, parameter):
        slices = super().experts(config, parameter)
        return [slices[i] for i in sorted(range(len(slices)), key=str)]


class TieForgottenWithoutHeadDim(LlamaAdapter):
    def weights(self, config, tensor_names):
        tied = config.get("tie_word_embeddings") and config.get("head_dim") is not None
        return super().weights({**config, "tie_word_embeddings": tied}, tensor_names)


class ScalingInOldWordsDropped(LlamaAdapter):
    """transformers writes `rope_parameters` of the tiny config; what is published says
    `rope_scaling`.
    """

    def text_config(self, config):
        return {key: value for key, value in config.items() if key != "rope_scaling"}


class BiasesOnlyTogether(LlamaAdapter):
    """The tiny config has those of attention and of the MLP, the published one the first."""

    def layer_parameters(self, config, layer_idx):
        both = config.get("attention_bias") and config.get("mlp_bias")
        return super().layer_parameters({**config, "attention_bias": both}, layer_idx)

    def catalog(self):
        return (_entry({**_LARGE, "attention_bias": True}),)


class SparseStepIgnored(Qwen3MoeAdapter):
    """No step is in the tiny config, and the published one has experts in every other layer."""

    def is_dense(self, config, layer_idx):
        return super().is_dense({**config, "decoder_sparse_step": 1}, layer_idx)

    def catalog(self):
        (large, _) = super().catalog()
        return (_entry({**large.config, "decoder_sparse_step": 2}),)


class DenseLayersBeyondTheTiny(Qwen3MoeAdapter):
    """The dense layer of the tiny config is known, others are not."""

    def is_dense(self, config, layer_idx):
        return layer_idx == 1 and super().is_dense(config, layer_idx)

    def catalog(self):
        (large, _) = super().catalog()
        return (_entry({**large.config, "mlp_only_layers": [0, 40]}),)


class SizesUnstated(LlamaAdapter):
    def catalog(self):
        return (_entry({k: v for k, v in _LARGE.items() if k != "num_hidden_layers"}),)


class LinearIgnored(LlamaAdapter):
    def text_config(self, config):
        kept = dict(config)
        for key in ("rope_scaling", "rope_parameters"):
            rope = kept.get(key)
            if rope and rope.get("rope_type") == "linear":
                kept[key] = {k: v for k, v in rope.items() if k != "factor"}
                kept[key]["rope_type"] = "default"
        return kept


class YarnWithoutItsFactor(LlamaAdapter):
    def text_config(self, config):
        rope = config.get("rope_scaling") or {}
        if rope.get("rope_type") != "yarn":
            return config
        return {**config, "rope_scaling": {**rope, "attention_factor": 1.0}}


class DeclaredButRefused(LlamaAdapter):
    def layout(self, config):
        if (config.get("rope_scaling") or {}).get("rope_type") == "yarn":
            raise ConfigError("config.json: rope type yarn is not known")
        return super().layout(config)


class TiesNotRun(LlamaAdapter):
    """A good one, whose author's small configs leave out what the published ones have."""


class GroupsNotRun(GptOssAdapter):
    """As above."""


BROKEN_CONFIGS = [
    broken_adapter("configs.unstated", "An unstated tie is assumed.", TieAssumed),
    broken_adapter("configs.unstated", "An unstated tie is not assumed.", UntiedUnlessStated),
    broken_adapter(
        "configs.unstated",
        "Every layer has a window where none are listed.",
        EveryLayerSlidesUnlessListed,
    ),
    broken_adapter("exact.blockwise", "A soft cap is not declared.", SoftCapNotDeclared),
    broken_adapter(
        "configs.unstated", "An unstated head dimension is derived.", HeadDimFromHiddenSize
    ),
    broken_adapter("configs.unstated", "Unstated KV heads are the query heads.", NoKVHeadsAssumed),
    broken_adapter("configs.unstated", "An unstated window is another one.", WindowOf4096Assumed),
    broken_adapter("configs.unstated", "Unstated biases are forgotten.", NoBiasAssumed),
    broken_adapter(
        "configs.unstated", "An unstated rope base is that of Llama 3.", RopeThetaOfLlama3Assumed
    ),
    broken_adapter("configs.unstated", "An unstated epsilon is another one.", EpsilonAssumed),
    broken_adapter(
        "configs.unstated", "A config without layer types is refused.", LayerTypesDemanded
    ),
    broken_adapter("configs.unstated", "An unstated flag is a KeyError.", FlagDemanded),
    broken_adapter(
        "configs.unstated", "Unstated layer types are all full.", AllLayersFullUnlessListed
    ),
    broken_adapter(
        "configs.caches", "At most two query heads per KV head are known.", TwoQueryHeadsAtMost
    ),
    broken_adapter("configs.caches", "Caches end at layer 16.", SixteenLayersAtMost),
    broken_adapter(
        "configs.caches", "Windows are never longer than the tiny one.", WindowOfTheTinyOne
    ),
    broken_adapter(
        "configs.caches", "The pattern of layers holds for three.", PatternOfThreeLayers
    ),
    broken_adapter("configs.small", "A square projection is transposed.", SquareTurned),
    broken_adapter("configs.small", "Layer 10 comes after layer 1.", LayersSortedAsWords),
    broken_adapter("configs.small", "Expert 10 comes after expert 1.", ExpertsSortedAsWords),
    broken_adapter(
        "configs.small", "A tie is forgotten where no head_dim is.", TieForgottenWithoutHeadDim
    ),
    broken_adapter(
        "configs.small", "Rope scaling in old words is dropped.", ScalingInOldWordsDropped
    ),
    broken_adapter("configs.small", "One bias is not known without another.", BiasesOnlyTogether),
    broken_adapter("configs.small", "Every layer is taken to have experts.", SparseStepIgnored),
    broken_adapter("configs.small", "Only layer 1 may be dense.", DenseLayersBeyondTheTiny),
    broken_adapter("configs.small", "An entry that cannot be made small.", SizesUnstated),
    broken_adapter("configs.rope-types", "Linear scaling is ignored.", LinearIgnored),
    broken_adapter("configs.rope-types", "YaRN does not scale attention.", YarnWithoutItsFactor),
    broken_adapter("configs.rope-types", "YaRN is declared and refused.", DeclaredButRefused),
    broken_adapter(
        "configs.active",
        "No model with a tied head is run.",
        TiesNotRun,
        small_configs={
            entry.id: {**make_small(entry.config), "tie_word_embeddings": False}
            for entry in LlamaAdapter().catalog()
        },
    ),
    broken_adapter(
        "configs.active",
        "No model with more than two query heads per KV head is run.",
        GroupsNotRun,
        small_configs=dict.fromkeys(("gpt-oss-20B", "gpt-oss-120B"), GptOssAdapter().tiny_config()),
    ),
]
