"""Qwen3-Next and Qwen3-MoE. Free of torch until a model is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ollm_adapter_qwen3_next.catalog import qwen3_moe, qwen3_next
from ollm_adapter_qwen3_next.moe import QwenMoe
from ollm_core import (
    CatalogEntry,
    Config,
    Layout,
    StateShape,
    hookimpl,
    read_size,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 512,
}


class Qwen3MoeAdapter(QwenMoe):
    """Every checkpoint with `model_type` qwen3_moe."""

    name = "qwen3-moe"
    model_types = ("qwen3_moe",)

    def mixer_parameters(self, config: Config, layer_idx: int) -> Iterator[str]:
        """See QwenMoe."""
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
            if config.get("attention_bias"):
                yield f"self_attn.{leaf}.bias"
        yield from ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

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


class Qwen3NextAdapter(QwenMoe):
    """Every checkpoint with `model_type` qwen3_next: three layers of gated DeltaNet to one of gated
    attention.
    """

    name = "qwen3-next"
    model_types = ("qwen3_next",)
    defaults = MappingProxyType({"head_dim": 256})
    sizes = (
        *QwenMoe.sizes,
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
    )

    def layer_types(self, config: Config) -> Sequence[str]:
        """See DecoderAdapter. Without a list, every fourth layer has full attention."""
        if config.get("layer_types") is not None:
            return super().layer_types(config)
        interval = read_size({"full_attention_interval": 4, **config}, "full_attention_interval")
        return tuple(
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(read_size(config, "num_hidden_layers", 10_000))
        )

    def recurrent_states(self, config: Config) -> Sequence[StateShape]:
        """See DecoderAdapter."""
        keys, values = _linear_widths(config)
        heads, width = config["linear_num_value_heads"], config["linear_conv_kernel_dim"]
        key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
        return (
            StateShape((2 * keys + values, width)),
            StateShape((heads, key_dim, value_dim), float32=True),
        )

    def layout(self, config: Config) -> Layout:
        """See ModelAdapter."""
        return replace(super().layout(config), mixer=mixer)

    def mixer_parameters(self, config: Config, layer_idx: int) -> Iterator[str]:
        """See QwenMoe."""
        if self.layer_types(config)[layer_idx] == "linear_attention":
            yield from ("linear_attn.dt_bias", "linear_attn.A_log")
            for leaf in ("conv1d", "in_proj_qkvz", "in_proj_ba", "norm", "out_proj"):
                yield f"linear_attn.{leaf}.weight"
            return
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
            if config.get("attention_bias"):
                yield f"self_attn.{leaf}.bias"
        yield from ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

    def router_parameters(self) -> Iterator[str]:
        """See QwenMoe: beside the router, an expert that every token goes to."""
        yield from ("gate.weight", "shared_expert_gate.weight")
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield f"shared_expert.{leaf}.weight"

    def ignores(self, config: Config, tensor: str) -> bool:
        """See DecoderAdapter: the head that predicts a further token is not used."""
        return tensor.startswith("mtp.")

    def catalog(self) -> Sequence[CatalogEntry]:
        """See ModelAdapter."""
        return qwen3_next()

    def tiny_config(self) -> dict[str, Any]:
        """Both kinds of layers, one of them dense, more value heads than key heads, a part of each
        head rotated, and a shared expert.
        """
        return {
            **_TINY,
            "architectures": ["Qwen3NextForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 32,
            "layer_types": [
                "linear_attention",
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
            "mlp_only_layers": [1],
            "model_type": "qwen3_next",
            "num_hidden_layers": 5,
            "partial_rotary_factor": 0.25,
            "shared_expert_intermediate_size": 40,
        }


def _linear_widths(config: Config) -> tuple[int, int]:
    """Channels of the keys and of the values of linear attention."""
    return (
        config["linear_key_head_dim"] * config["linear_num_key_heads"],
        config["linear_value_head_dim"] * config["linear_num_value_heads"],
    )


def mixer(layer: nn.Module, hidden: Tensor, **options: Any) -> Tensor:
    """The first half of a layer, [R, T, C] -> the same: the norm, one kind of attention or the
    other, and the residual.
    """
    parts = dict(layer.named_children())
    normed = parts["input_layernorm"](hidden)
    if "linear_attn" in parts:
        cache = options.pop("past_key_values")
        mask = options.pop("attention_mask")
        mixed = parts["linear_attn"](hidden_states=normed, cache_params=cache, attention_mask=mask)
    else:
        mixed = parts["self_attn"](hidden_states=normed, **options)[0]
    output: Tensor = hidden + mixed
    return output


@hookimpl
def ollm_adapters() -> list[QwenMoe]:
    """What this distribution adds to oLLM."""
    return [Qwen3NextAdapter(), Qwen3MoeAdapter()]
