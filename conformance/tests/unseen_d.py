"""Faults found by going through the contracts of adapters, core and parts, without knowing any
check. For tests only.
"""

from __future__ import annotations

import functools
from types import MappingProxyType

from broken import unseen
from families import Qwen3, Qwen3Moe

from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen35Adapter
from ollm_core import DecoderAdapter


# Hurts: every published Qwen2: its projections have biases, its config.json does not say so, and
# the good checkpoint is refused for tensors that no such model has.
class BiasesThatConfigsSay(DecoderAdapter):
    name = "qwen2"
    model_types = ("qwen2",)
    defaults = MappingProxyType(
        {
            "max_window_layers": 28,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "use_sliding_window": False,
        }
    )

    def layer_parameters(self, config, layer_idx):
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
            if leaf != "o_proj" and config.get("attention_bias"):
                yield f"self_attn.{leaf}.bias"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield f"mlp.{leaf}.weight"

    def tiny_config(self):
        dropped = ("mlp_bias", "head_dim", "rope_scaling")
        config = LlamaAdapter().tiny_config()
        return {
            **{key: value for key, value in config.items() if key not in dropped},
            "architectures": ["Qwen2ForCausalLM"],
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "model_type": "qwen2",
            "sliding_window": 100,
            "use_sliding_window": True,
        }


# Hurts: a mixture larger than memory: what was fused once stays, with the buffers that it was read
# into, outside every account, until the machine has no memory left.
class FusedOnce(Qwen3Moe):
    fused = staticmethod(functools.lru_cache(maxsize=256)(Qwen3Moe.fused))


# Hurts: a mixture in bfloat16 with large experts inside a tight budget: each fused parameter is
# made at twice its size, beside itself, and no scratch is told.
class FusedInFloat32(Qwen3Moe):
    @staticmethod
    def fused(gate, up):
        return Qwen3Moe.fused(gate.float(), up.float()).to(gate.dtype)


# Hurts: a config.json of a pruned model beside the whole one's weights: the layers that are left
# over pass for a layer that drafts, and every token is that of half a model.
class DeeperLayersIgnored(LlamaAdapter):
    def ignores(self, config, tensor):
        number, _, _ = tensor.removeprefix("model.layers.").partition(".")
        deeper = number.isdigit() and int(number) >= config["num_hidden_layers"]
        return deeper or super().ignores(config, tensor)


# Hurts: a Llama whose config.json has a stray sliding_window, as those that were converted from
# Mistral: its layers see all tokens, the store lets go of the early ones, and a long prompt fails.
class StrayWindowBelieved(LlamaAdapter):
    layer_types = DecoderAdapter.layer_types


# Hurts: a small Qwen3.5 that also sees: only the outer config says that its head is tied, and the
# good checkpoint is refused for the head that it lacks.
class TiedOutsideTheText(Qwen35Adapter):
    def text_config(self, config):
        return config.get("text_config") or config


# Hurts: two models of one depth in one process, as when one drafts for the other: the second gets
# the windows of the first.
class WindowsRememberedByDepth(Qwen3):
    _types = {}  # noqa: RUF012 - the fault

    def layer_types(self, config):
        key = config["num_hidden_layers"], config.get("sliding_window")
        if key not in self._types:
            self._types[key] = super().layer_types(config)
        return self._types[key]


# Hurts: every mixture of more than ten experts: expert 10 is taken for expert 2. The author's own
# tiny model has eight.
class ExpertsByTheirNames(Qwen3Moe):
    def experts(self, config, parameter):
        return sorted(super().experts(config, parameter), key=lambda source: source.tensors)

    def tiny_config(self):
        return {**super().tiny_config(), "num_experts": 8}


UNSEEN = [
    unseen("biases are those that config.json tells of", BiasesThatConfigsSay),
    unseen("what was fused is remembered", FusedOnce),
    unseen("experts are fused in float32, and nothing says so", FusedInFloat32),
    unseen("layers past the last one are superfluous", DeeperLayersIgnored),
    unseen("a Llama has windows if its config.json has the key", StrayWindowBelieved),
    unseen("whether the head is tied is looked for in the text's config alone", TiedOutsideTheText),
    unseen("layer types are remembered by depth and window", WindowsRememberedByDepth),
    unseen("experts are in the order of their names", ExpertsByTheirNames),
]
