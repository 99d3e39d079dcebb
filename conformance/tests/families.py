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
            "sliding_window": None,
            "use_sliding_window": False,
            "rope_scaling": None,
        }


class Limited(LlamaAdapter):
    """A good adapter that declares to do nothing beyond the plainest run."""

    @property
    def capabilities(self):
        return {name: Capability("unsupported", f"no {name} here") for name in _NOT_HERE}
