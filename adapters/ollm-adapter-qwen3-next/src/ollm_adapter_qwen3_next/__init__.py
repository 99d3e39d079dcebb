"""Qwen3-MoE, and the hybrids Qwen3-Next and Qwen3.5. Free of torch until a model is opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ollm_adapter_qwen3_next.catalog import qwen3_moe, qwen3_next
from ollm_adapter_qwen3_next.hybrid import LINEAR_SIZES, QwenHybrid
from ollm_adapter_qwen3_next.moe import QwenMoe
from ollm_adapter_qwen3_next.stored import STACKED, as_stored, text_config
from ollm_core import CatalogEntry, Config, Layout, ParameterSource, WeightPlan, hookimpl, read_size

_TINY = {
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 512,
}


_TINY_HYBRID = {
    "attention_bias": False,
    "head_dim": 32,
    "layer_types": [
        "linear_attention",
        "full_attention",
        "linear_attention",
        "full_attention",
    ],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 24,
    "num_hidden_layers": 4,
    "partial_rotary_factor": 0.25,
    "shared_expert_intermediate_size": 40,
}

_TINY_ROPE = {
    "rope_theta": None,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "rope_type": "default",
    },
}


class Qwen3MoeAdapter(QwenMoe):
    """Every checkpoint with `model_type` qwen3_moe."""

    name = "qwen3-moe"
    model_types = ("qwen3_moe",)
    defaults = MappingProxyType({"num_key_value_heads": 4, "sliding_window": 4096})

    def layer_types(self, config: Config) -> Sequence[str]:
        """See DecoderAdapter. This family knows a window for all layers, or none."""
        windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
        kind = "sliding_attention" if windowed else "full_attention"
        return (kind,) * read_size(config, "num_hidden_layers", 10_000)

    def catalog(self) -> Sequence[CatalogEntry]:
        """See ModelAdapter."""
        return qwen3_moe()

    def tiny_config(self) -> dict[str, Any]:
        """A dense layer between two with experts, norms of queries and keys."""
        return {
            **_TINY,
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 24,
            "mlp_only_layers": [1],
            "model_type": "qwen3_moe",
            "num_hidden_layers": 3,
        }


class Qwen3NextAdapter(QwenHybrid):
    """Every checkpoint with `model_type` qwen3_next."""

    name = "qwen3-next"
    model_types = ("qwen3_next",)
    projections = ("in_proj_qkvz", "in_proj_ba")

    def catalog(self) -> Sequence[CatalogEntry]:
        """See ModelAdapter."""
        return qwen3_next()

    def tiny_config(self) -> dict[str, Any]:
        """Both kinds of layers, one of them dense, more value heads than key heads, a part of each
        head rotated, and a shared expert.
        """
        return {
            **_TINY,
            **deepcopy(_TINY_HYBRID),
            "architectures": ["Qwen3NextForCausalLM"],
            "mlp_only_layers": [1],
            "model_type": "qwen3_next",
        }


class Qwen35MoeAdapter(QwenHybrid):
    """The language model of every checkpoint with `model_type` qwen3_5_moe: Qwen3.5 and 3.6 with
    experts. Images are not read.
    """

    name = "qwen3-5-moe"
    model_types = ("qwen3_5_moe", "qwen3_5_moe_text")
    projections = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def text_config(self, config: Config) -> Config:
        """See ModelAdapter."""
        return text_config(config)

    def layout(self, config: Config) -> Layout:
        """See ModelAdapter."""
        return replace(super().layout(config), rotary_axes=3)

    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        """See ModelAdapter. Experts are stored alone or stacked, the language model at the top or
        below the one that also sees.
        """
        return as_stored(super().weights, config, tensor_names)

    def experts(self, config: Config, parameter: str) -> Sequence[ParameterSource]:
        """See DecoderAdapter."""
        apart = super().experts(config, parameter)
        if apart and config.get(STACKED):
            return [ParameterSource((parameter,), row=number) for number in range(len(apart))]
        return apart

    def tiny_config(self) -> dict[str, Any]:
        """As of Qwen3-Next, with experts in every layer and rotary positions in three parts."""
        return {
            **_TINY,
            **deepcopy(_TINY_HYBRID),
            **deepcopy(_TINY_ROPE),
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": "qwen3_5_moe_text",
        }


class Qwen35Adapter(QwenHybrid):
    """The language model of every checkpoint with `model_type` qwen3_5: Qwen3.5 and 3.6 without
    experts. Images are not read.
    """

    name = "qwen3-5"
    model_types = ("qwen3_5", "qwen3_5_text")
    defaults = MappingProxyType({"head_dim": 256, "num_key_value_heads": 4})
    sizes = ("vocab_size", "hidden_size", "intermediate_size", *LINEAR_SIZES)
    projections = Qwen35MoeAdapter.projections

    def text_config(self, config: Config) -> Config:
        """See ModelAdapter."""
        return text_config(config)

    def layout(self, config: Config) -> Layout:
        """See ModelAdapter."""
        return replace(super().layout(config), experts="", mixer=None, rotary_axes=3)

    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        """See ModelAdapter: the language model at the top, or below the one that also sees."""
        return as_stored(super().weights, config, tensor_names)

    def num_experts(self, config: Config) -> int:
        """See QwenMoe: none."""
        return 0

    def is_dense(self, config: Config, layer_idx: int) -> bool:
        """See QwenMoe: all layers are."""
        return True

    def tiny_config(self) -> dict[str, Any]:
        """As of the family with experts, but for those."""
        return {
            **{key: value for key, value in _TINY.items() if "expert" not in key},
            **{key: value for key, value in deepcopy(_TINY_HYBRID).items() if "expert" not in key},
            **deepcopy(_TINY_ROPE),
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
        }


@hookimpl
def ollm_adapters() -> list[QwenMoe]:
    """What this distribution adds to oLLM."""
    return [Qwen3NextAdapter(), Qwen3MoeAdapter(), Qwen35MoeAdapter(), Qwen35Adapter()]
