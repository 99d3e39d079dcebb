"""The models that can be named by id, with the content of their config.json, and a tiny one."""

from __future__ import annotations

from typing import Any

from ollm_core import CatalogEntry, catalog_entry


def _layer_types(num_layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]


def _common() -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 2880,
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 8,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 201088,
    }


def _config(num_layers: int, num_experts: int) -> dict[str, Any]:
    return {
        **_common(),
        "layer_types": _layer_types(num_layers),
        "num_hidden_layers": num_layers,
        "num_local_experts": num_experts,
    }


def entries() -> tuple[CatalogEntry, ...]:
    """New objects at every call: what transformers does to a config stays with that caller."""
    return (
        catalog_entry(
            "gpt-oss-20B",
            "openai/gpt-oss-20b",
            _config(24, 32),
            num_parameters=20_914_757_184,
            weight_bytes=13_761_264_768,
            license="apache-2.0",
            aliases=("gpt-oss:20b", "gpt-oss"),
        ),
        catalog_entry(
            "gpt-oss-120B",
            "openai/gpt-oss-120b",
            _config(36, 128),
            num_parameters=116_829_156_672,
            weight_bytes=65_248_815_744,
            license="apache-2.0",
            aliases=("gpt-oss:120b",),
        ),
    )


def tiny() -> dict[str, Any]:
    """A small config with every feature of the family."""
    common = _common()
    return {
        **common,
        "eos_token_id": 2,
        "experts_per_token": 2,
        "head_dim": 32,
        "hidden_size": 64,
        "initial_context_length": 256,
        "intermediate_size": 32,
        "layer_types": _layer_types(3),
        "max_position_embeddings": 2048,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "pad_token_id": 0,
        "rope_scaling": {
            **common["rope_scaling"],
            "factor": 8.0,
            "original_max_position_embeddings": 256,
        },
        "rope_theta": 10000,
        "sliding_window": 100,
        "swiglu_limit": 1.0,
        "torch_dtype": "float32",
        "vocab_size": 256,
    }
