"""Adapters that are wrong in one way each: a few lines on the good Llama adapter, or on one of
families.py.
"""

from __future__ import annotations

from dataclasses import replace

from broken import broken_adapter
from families import Qwen3, Qwen3Moe
from unclean_adapters import ChangesTransformers, NeedsTorch, PrintsWhenAsked

from ollm_adapter_llama import LlamaAdapter
from ollm_core import CacheKind, Capability, ParameterSource, WeightPlan

_SHARED_CONFIG = LlamaAdapter().tiny_config()
_KEPT = []


class WrongRopeBase(LlamaAdapter):
    def text_config(self, config):
        return _with_rope(config, rope_theta=5000.0)


class RopeScalingIgnored(LlamaAdapter):
    def text_config(self, config):
        return _with_rope(config, rope_type="default")


class WrongEpsilon(LlamaAdapter):
    def text_config(self, config):
        return {**config, "rms_norm_eps": 1e-3}


class WrongActivation(LlamaAdapter):
    def text_config(self, config):
        return {**config, "hidden_act": "gelu"}


class KVHeadsRepeated(LlamaAdapter):
    def caches(self, config):
        heads = config["num_attention_heads"]
        return [replace(kind, num_kv_heads=heads) for kind in super().caches(config)]


class WrongHeadDim(LlamaAdapter):
    def caches(self, config):
        return [replace(kind, head_dim=kind.head_dim // 2) for kind in super().caches(config)]


class WindowWhereNoneIs(LlamaAdapter):
    def caches(self, config):
        return [
            CacheKind("sliding", k.num_kv_heads, k.head_dim, 64) for k in super().caches(config)
        ]


class CacheForgotten(LlamaAdapter):
    def caches(self, config):
        return super().caches(config)[:-1]


class NeverTied(LlamaAdapter):
    def weights(self, config, tensor_names):
        return super().weights({**config, "tie_word_embeddings": False}, tensor_names)


class TiedHeadLoadedTwice(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = list(tensor_names)
        tied = config.get("tie_word_embeddings") and "lm_head.weight" not in names
        return super().weights({**config, "tie_word_embeddings": tied}, names)


class AnotherNorm(LlamaAdapter):
    def layout(self, config):
        return replace(super().layout(config), norm="model.layers.0.input_layernorm")


class AnotherHalf(Qwen3Moe):
    def layout(self, config):
        return replace(super().layout(config), mixer=_half_of_the_residual)


def _half_of_the_residual(layer, hidden, **options):
    normed = layer.input_layernorm(hidden)
    return 0.5 * hidden + layer.self_attn(hidden_states=normed, **options)[0]


class EmbeddingOfTheStoredHead(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = set(tensor_names)
        if config.get("tie_word_embeddings") and "lm_head.weight" in names:
            plan = super().weights(config, names - {"model.embed_tokens.weight"})
            return replace(plan, ignored=plan.ignored | {"model.embed_tokens.weight"})
        return super().weights(config, names)


class TransposedProjection(LlamaAdapter):
    def source(self, config, parameter):
        if parameter.endswith("k_proj.weight"):
            return ParameterSource((parameter,), lambda tensor: tensor.t().contiguous())
        return super().source(config, parameter)


class GateAndUpSwapped(LlamaAdapter):
    def source(self, config, parameter):
        swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for name, other in swapped.items():
            if f".{name}." in parameter:
                return ParameterSource((parameter.replace(name, other),))
        return super().source(config, parameter)


class NormsSwapped(LlamaAdapter):
    def source(self, config, parameter):
        first, second = "input_layernorm", "post_attention_layernorm"
        if first in parameter:
            return ParameterSource((parameter.replace(first, second),))
        if second in parameter:
            return ParameterSource((parameter.replace(second, first),))
        return super().source(config, parameter)


class DuplicatedLayer(LlamaAdapter):
    def source(self, config, parameter):
        return ParameterSource((parameter.replace("layers.1.", "layers.0."),))

    def ignores(self, config, tensor):
        return "layers.1." in tensor


class LastLayerDropped(LlamaAdapter):
    def layout(self, config):
        layout = super().layout(config)
        return replace(layout, num_layers=layout.num_layers - 1)


class WrongHeadPath(LlamaAdapter):
    def layout(self, config):
        return replace(super().layout(config), head="model.embed_tokens")


class BiasesForgotten(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        return (n for n in super().layer_parameters(config, layer_idx) if "bias" not in n)

    def ignores(self, config, tensor):
        return tensor.endswith(".bias")


class BiasesAlways(LlamaAdapter):
    def layer_parameters(self, config, layer_idx):
        return super().layer_parameters({**config, "attention_bias": True}, layer_idx)


class ForeignTensorsIgnored(LlamaAdapter):
    def ignores(self, config, tensor):
        return True


class MissingTensorsUnnoticed(LlamaAdapter):
    def weights(self, config, tensor_names):
        names = list(self._parameter_names(config, self.layout(config)))
        super().weights({**config, "tie_word_embeddings": False}, {*names, *tensor_names})
        return WeightPlan({name: ParameterSource((name,)) for name in names})


class RoundedToHalf(LlamaAdapter):
    def source(self, config, parameter):
        if parameter.endswith("down_proj.weight"):
            return ParameterSource((parameter,), lambda tensor: tensor.half().to(tensor.dtype))
        return super().source(config, parameter)


class ScaledQueries(LlamaAdapter):
    def source(self, config, parameter):
        if parameter.endswith("q_proj.weight"):
            return ParameterSource((parameter,), lambda tensor: tensor * 2)
        return super().source(config, parameter)


class NoQueryNorm(Qwen3):
    def source(self, config, parameter):
        if parameter.endswith("q_norm.weight"):
            return ParameterSource((parameter,), lambda tensor: tensor * 0 + 1)
        return super().source(config, parameter)


class QueryAndKeyNormsSwapped(Qwen3):
    def source(self, config, parameter):
        if parameter.endswith("q_norm.weight"):
            return ParameterSource((parameter.replace("q_norm", "k_norm"),))
        if parameter.endswith("k_norm.weight"):
            return ParameterSource((parameter.replace("k_norm", "q_norm"),))
        return super().source(config, parameter)


class WindowOffByOne(Qwen3):
    def text_config(self, config):
        return {**config, "sliding_window": config["sliding_window"] + 1}


class CacheWindowOffByOne(Qwen3):
    def caches(self, config):
        return super().caches({**config, "sliding_window": config["sliding_window"] - 1})


class WindowIgnored(Qwen3):
    def layer_types(self, config):
        return ["full_attention"] * config["num_hidden_layers"]


class WindowsInOtherLayers(Qwen3):
    def text_config(self, config):
        return {**config, "layer_types": config["layer_types"][1:] + config["layer_types"][:1]}


class ChangesItsConfig(LlamaAdapter):
    def weights(self, config, tensor_names):
        config["seen"] = True
        return super().weights(config, tensor_names)


class SharesItsConfig(LlamaAdapter):
    def tiny_config(self):
        _SHARED_CONFIG["calls"] = _SHARED_CONFIG.get("calls", 0) + 1
        return _SHARED_CONFIG


class ClaimsAnotherType(LlamaAdapter):
    model_types = ("mistral",)


class OddName(LlamaAdapter):
    name = "My Llama!"


class UnknownCapability(LlamaAdapter):
    @property
    def capabilities(self):
        return {"telepathy": Capability()}


class NoRealReason(LlamaAdapter):
    @property
    def capabilities(self):
        return {"kv-host": Capability("unsupported", "no")}


class WrongCatalogSize(LlamaAdapter):
    def catalog(self):
        return [replace(e, num_parameters=e.num_parameters + 1) for e in super().catalog()]


class ForeignCatalog(LlamaAdapter):
    def catalog(self):
        first, *_ = super().catalog()
        return [replace(first, config={**first.config, "model_type": "mistral"})]


class TinyIsLarge(LlamaAdapter):
    def tiny_config(self):
        return {**super().tiny_config(), "intermediate_size": 60_000}


class TinyIsShort(LlamaAdapter):
    def tiny_config(self):
        return {**super().tiny_config(), "max_position_embeddings": 128}


class TrustsItsConfig(LlamaAdapter):
    def layout(self, config):
        if config["num_attention_heads"] % config["num_key_value_heads"]:
            raise ValueError("heads")
        return super().layout(config)


class KeepsWhatItIsGiven(LlamaAdapter):
    def source(self, config, parameter):
        if parameter.endswith("o_proj.weight"):
            return ParameterSource((parameter,), _keep)
        return super().source(config, parameter)


class CopiesTwice(LlamaAdapter):
    def source(self, config, parameter):
        if parameter.endswith("down_proj.weight"):
            return ParameterSource((parameter,), _wastefully)
        return super().source(config, parameter)


def _with_rope(config, **changes):
    """transformers writes `rope_parameters`, also for a config that had `rope_scaling`."""
    return {**config, "rope_parameters": {**config.get("rope_parameters", {}), **changes}}


def _keep(tensor):
    _KEPT.append(tensor.clone())
    return tensor


def _wastefully(tensor):
    return tensor.repeat(64, 1)[: tensor.shape[0]].clone()


BROKEN_ADAPTERS = [
    broken_adapter("exact.resident", "The base of the rotary frequencies is wrong.", WrongRopeBase),
    broken_adapter("exact.resident", "Scaling of the frequencies is ignored.", RopeScalingIgnored),
    broken_adapter("exact.decode", "The epsilon of the norms is wrong.", WrongEpsilon),
    broken_adapter("exact.streamed", "The MLP has another activation.", WrongActivation),
    broken_adapter("caches.kinds", "KV heads are repeated to query heads.", KVHeadsRepeated),
    broken_adapter("caches.kinds", "The head dimension of the cache is wrong.", WrongHeadDim),
    broken_adapter("caches.kinds", "Full layers are declared sliding.", WindowWhereNoneIs),
    broken_adapter("caches.kinds", "The last layer has no cache.", CacheForgotten),
    broken_adapter("weights.tied-head", "A tied head is taken for its own tensor.", NeverTied),
    broken_adapter(
        "weights.tied-head", "A tied head that is stored is loaded again.", TiedHeadLoadedTwice
    ),
    broken_adapter(
        "weights.head-differs",
        "A tied model takes a stored head for its embedding too.",
        EmbeddingOfTheStoredHead,
    ),
    broken_adapter("weights.values", "A projection is transposed.", TransposedProjection),
    broken_adapter("weights.values", "Gate and up projections are swapped.", GateAndUpSwapped),
    broken_adapter("weights.values", "The two norms of a layer are swapped.", NormsSwapped),
    broken_adapter("weights.every-tensor-once", "Layer 1 is layer 0 again.", DuplicatedLayer),
    broken_adapter("declaration.layout", "The last layer is left out.", LastLayerDropped),
    broken_adapter("declaration.layout", "The head is looked for elsewhere.", WrongHeadPath),
    broken_adapter("declaration.outside-layers", "Its final norm is another one.", AnotherNorm),
    broken_adapter("declaration.halves", "The mixer scales the residual.", AnotherHalf),
    broken_adapter("weights.every-tensor-once", "Biases are left out.", BiasesForgotten),
    broken_adapter(
        "weights.catalog-complete", "Biases are asked for that no real model has.", BiasesAlways
    ),
    broken_adapter(
        "weights.foreign-tensor", "Tensors of other kinds are ignored.", ForeignTensorsIgnored
    ),
    broken_adapter(
        "weights.missing-tensor", "A missing tensor is not noticed.", MissingTensorsUnnoticed
    ),
    broken_adapter("weights.values", "Weights lose bits on the way.", RoundedToHalf),
    broken_adapter("weights.values", "The queries are scaled twice.", ScaledQueries),
    broken_adapter("weights.values", "The query norm is missing.", NoQueryNorm),
    broken_adapter("weights.values", "Query and key norms are swapped.", QueryAndKeyNormsSwapped),
    broken_adapter("exact.resident", "Windows are one token too long.", WindowOffByOne),
    broken_adapter("caches.kinds", "The cache's window is one token short.", CacheWindowOffByOne),
    broken_adapter("caches.kinds", "Windows are ignored.", WindowIgnored),
    broken_adapter("exact.blockwise", "Other layers than those slide.", WindowsInOtherLayers),
    broken_adapter("declaration.imports-clean", "It prints when asked.", PrintsWhenAsked),
    broken_adapter("declaration.imports-clean", "Its declarations need torch.", NeedsTorch),
    broken_adapter(
        "declaration.imports-clean", "It replaces a class of transformers.", ChangesTransformers
    ),
    broken_adapter("declaration.pure", "It changes the config that it reads.", ChangesItsConfig),
    broken_adapter("declaration.pure", "All its tiny configs are one object.", SharesItsConfig),
    broken_adapter("declaration.names", "It claims another model type.", ClaimsAnotherType),
    broken_adapter("declaration.names", "Its name cannot be typed.", OddName),
    broken_adapter("declaration.capabilities", "It declares what nobody knows.", UnknownCapability),
    broken_adapter("declaration.capabilities", "It gives no reason for a limit.", NoRealReason),
    broken_adapter("declaration.catalog", "A size in the catalog is wrong.", WrongCatalogSize),
    broken_adapter("declaration.catalog", "The catalog has foreign models.", ForeignCatalog),
    broken_adapter("declaration.tiny-config", "The tiny model is large.", TinyIsLarge),
    broken_adapter("declaration.tiny-config", "The tiny model is too short.", TinyIsShort),
    broken_adapter("declaration.hostile-config", "It trusts config.json.", TrustsItsConfig),
    broken_adapter("memory.freed", "It keeps the weights that it saw.", KeepsWhatItIsGiven),
    broken_adapter("memory.planned", "It copies far more than it returns.", CopiesTwice),
]
