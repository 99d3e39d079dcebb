"""The models that can be named by id, with the content of their config.json."""

from __future__ import annotations

from typing import Any

from ollm_core import CatalogEntry, catalog_entry

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_NEXT_80B: dict[str, Any] = {
    **_COMMON,
    "architectures": ["Qwen3NextForCausalLM"],
    "full_attention_interval": 4,
    "head_dim": 256,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "shared_expert_intermediate_size": 512,
}

_MOE_30B: dict[str, Any] = {
    **_COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "sliding_window": None,
}


def qwen3_next() -> tuple[CatalogEntry, ...]:
    """New objects at every call. The bytes count the layer that drafts, the parameters do not."""
    return tuple(
        catalog_entry(
            model_id,
            f"Qwen/Qwen3-Next-80B-A3B-{kind}",
            _NEXT_80B,
            num_parameters=79_674_391_296,
            weight_bytes=2 * 81_324_862_720,
            ignored_bytes=2 * 1_650_471_424,
            license="apache-2.0",
            aliases=aliases,
        )
        for model_id, kind, *aliases in (
            ("qwen3-next-80B", "Instruct", "qwen3-next:80b", "qwen3-next"),
            ("qwen3-next-80B-thinking", "Thinking", "qwen3-next:80b-thinking"),
        )
    )


def qwen3_moe() -> tuple[CatalogEntry, ...]:
    """New objects at every call."""
    return tuple(
        catalog_entry(
            model_id,
            f"Qwen/Qwen3-30B-A3B-{kind}-2507",
            _MOE_30B,
            num_parameters=30_532_122_624,
            license="apache-2.0",
            aliases=aliases,
        )
        for model_id, kind, *aliases in (
            ("qwen3-30B", "Instruct", "qwen3:30b", "qwen3:30b-instruct"),
            ("qwen3-30B-thinking", "Thinking", "qwen3:30b-thinking"),
        )
    )
