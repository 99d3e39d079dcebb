"""Good adapters of families that differ from Llama where adapters go wrong. For tests only."""

from __future__ import annotations

from ollm_adapter_llama import LlamaAdapter

from ollm_core import Capability, DecoderAdapter
from ollm_core.registry import CAPABILITIES

_NOT_HERE = sorted(CAPABILITIES.keys() - {"kv-device"})


class Qwen3(DecoderAdapter):
    """Norms of queries and keys."""

    name = "qwen3"
    model_types = ("qwen3",)

    def layer_parameters(self, config, layer_idx):
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield f"self_attn.{leaf}.weight"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield f"mlp.{leaf}.weight"

    def tiny_config(self):
        return {
            **LlamaAdapter().tiny_config(),
            "attention_bias": False,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 100,
            "use_sliding_window": True,
            "rope_scaling": None,
        }


class GptOss(DecoderAdapter):
    """Attention sinks, alternating windows, and experts that are whole parameters."""

    name = "gpt-oss"
    model_types = ("gpt_oss",)

    def layer_parameters(self, config, layer_idx):
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        yield "self_attn.sinks"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield from (f"self_attn.{leaf}.weight", f"self_attn.{leaf}.bias")
        yield from ("mlp.router.weight", "mlp.router.bias")
        for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            yield f"mlp.experts.{leaf}"

    def tiny_config(self):
        config = LlamaAdapter().tiny_config()
        return {
            **{key: value for key, value in config.items() if key != "mlp_bias"},
            "attention_bias": True,
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "intermediate_size": 48,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "sliding_window": 130,
            "rope_scaling": None,
        }


class Limited(LlamaAdapter):
    """A good adapter that declares to do nothing beyond the plainest run."""

    @property
    def capabilities(self):
        return {name: Capability("unsupported", f"no {name} here") for name in _NOT_HERE}
