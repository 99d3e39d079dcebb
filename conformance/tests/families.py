"""Good adapters of families that differ from Llama where adapters go wrong. For tests only."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from ollm_adapter_llama import LlamaAdapter
from ollm_core import (
    CAPABILITIES,
    Capability,
    Config,
    DecoderAdapter,
    ParameterSource,
    bad_config,
    read_size,
)

_NOT_HERE = sorted(CAPABILITIES.keys() - {"kv-device"})


class Qwen3(DecoderAdapter):
    """Norms of queries and keys."""

    name = "qwen3"
    model_types = ("qwen3",)
    defaults = MappingProxyType(
        {
            "head_dim": 128,
            "max_window_layers": 28,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "use_sliding_window": False,
        }
    )

    def layer_parameters(self, config, layer_idx):
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            yield f"self_attn.{leaf}.weight"
            if config.get("attention_bias") and leaf.endswith("proj"):
                yield f"self_attn.{leaf}.bias"
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


class Granite(DecoderAdapter):
    """Rows of the embedding are multiplied and logits divided, outside the layers."""

    name = "granite"
    model_types = ("granite",)

    def layer_parameters(self, config, layer_idx):
        return LlamaAdapter().layer_parameters(config, layer_idx)

    def tiny_config(self):
        return {
            **LlamaAdapter().tiny_config(),
            "architectures": ["GraniteForCausalLM"],
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "model_type": "granite",
            "residual_multiplier": 0.5,
        }


class GraniteOne(Granite):
    """Scores are not made smaller, and softmax is sharp."""

    def tiny_config(self):
        return {**super().tiny_config(), "attention_multiplier": 1.0}


class GraniteSmall(Granite):
    """As published: scores are small, and softmax is flat."""

    def tiny_config(self):
        return {**super().tiny_config(), "attention_multiplier": 0.015625}


class Gemma2(DecoderAdapter):
    """Norms on both sides of each half, soft caps, windows in every second layer, a tied head, and
    keys that its config.json leaves out.
    """

    name = "gemma2"
    model_types = ("gemma2",)
    defaults: Config = MappingProxyType(
        {
            "head_dim": 256,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        }
    )

    @property
    def capabilities(self):
        reason = "attention scores have a soft cap, which block-wise attention does not compute"
        return {"blockwise-attention": Capability("unsupported", reason)}

    def layer_parameters(self, config, layer_idx):
        yield from LlamaAdapter().layer_parameters(config, layer_idx)
        yield from ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")

    def layer_types(self, config):
        if config.get("layer_types") is not None:
            return super().layer_types(config)
        kinds = ("sliding_attention", "full_attention")
        return tuple(kinds[i % 2] for i in range(read_size(config, "num_hidden_layers", 1000)))

    def tiny_config(self):
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": True,
            "attn_logit_softcapping": 8.0,
            "bos_token_id": 2,
            "dtype": "bfloat16",
            "eos_token_id": 1,
            "final_logit_softcapping": 1.0,
            "head_dim": 32,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 64,
            "intermediate_size": 160,
            "max_position_embeddings": 8192,
            "model_type": "gemma2",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 24,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 100,
            "vocab_size": 256,
        }


class Qwen3Moe(Qwen3):
    """Experts that are read one by one; the middle layer has none."""

    name = "qwen3-moe"
    model_types = ("qwen3_moe",)
    defaults = MappingProxyType({"num_key_value_heads": 4, "sliding_window": 4096})

    def layout(self, config):
        return replace(super().layout(config), experts="mlp.experts")

    def layer_types(self, config):
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        kind = "full_attention" if window is None else "sliding_attention"
        return (kind,) * read_size(config, "num_hidden_layers", 1000)

    def layer_parameters(self, config, layer_idx):
        names = super().layer_parameters(config, layer_idx)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise bad_config("mlp_only_layers", dense, "a list of layers")
        step = config.get("decoder_sparse_step", 1)
        if type(step) is not int or step < 1:
            raise bad_config("decoder_sparse_step", step, "an integer from 1")
        if layer_idx in dense or (layer_idx + 1) % step:
            return list(names)
        attention = [name for name in names if not name.startswith("mlp")]
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return [*attention, "mlp.gate.weight", *experts]

    def experts(self, config, parameter):
        path, _, leaf = parameter.rpartition(".")
        if not path.endswith("experts"):
            return ()
        key = "num_local_experts" if "num_local_experts" in config else "num_experts"
        paths = [f"{path}.{number}" for number in range(read_size(config, key, 1024))]
        if leaf == "down_proj":
            return [ParameterSource((f"{one}.down_proj.weight",)) for one in paths]
        return [
            ParameterSource((f"{one}.gate_proj.weight", f"{one}.up_proj.weight"), self.fused)
            for one in paths
        ]

    @staticmethod
    def fused(gate, up):
        """One after the other."""
        import torch

        return torch.cat([gate, up])

    def tiny_config(self):
        dropped = ("layer_types", "sliding_window", "use_sliding_window", "mlp_bias")
        config = {key: value for key, value in super().tiny_config().items() if key not in dropped}
        return {
            **config,
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "mlp_only_layers": [1],
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_experts": 12,
            "num_experts_per_tok": 2,
        }


class GptOss(DecoderAdapter):
    """Attention sinks, alternating windows, and experts that are whole parameters."""

    name = "gpt-oss"
    model_types = ("gpt_oss",)
    defaults = MappingProxyType(
        {"head_dim": 64, "num_key_value_heads": 8, "num_local_experts": 128, "sliding_window": 128}
    )

    def layer_parameters(self, config, layer_idx):
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        yield "self_attn.sinks"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
            if config.get("attention_bias", True):
                yield f"self_attn.{leaf}.bias"
        yield from ("mlp.router.weight", "mlp.router.bias")
        for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            yield f"mlp.experts.{leaf}"

    def layer_types(self, config):
        if config.get("layer_types") is not None:
            return super().layer_types(config)
        whole = super().layer_types({**config, "sliding_window": None})
        return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(len(whole)))

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
