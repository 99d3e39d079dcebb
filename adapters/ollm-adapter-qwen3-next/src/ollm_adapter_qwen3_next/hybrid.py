"""Layers of gated DeltaNet between layers of gated attention: what those families share. Free of
torch until a model is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ollm_adapter_qwen3_next.moe import QwenMoe
from ollm_core import Config, Layout, StateShape, read_size

if TYPE_CHECKING:
    from torch import Tensor, nn

LINEAR_SIZES = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
)
"""Keys of a config that size a layer of linear attention."""


class QwenHybrid(QwenMoe):
    """Three layers of gated DeltaNet to one of gated attention, where the config does not list
    them; routed experts and one that every token goes to.
    """

    defaults = MappingProxyType({"head_dim": 256, "num_key_value_heads": 2})
    sizes = (*QwenMoe.sizes, *LINEAR_SIZES)
    projections: tuple[str, ...]
    """Of the input of linear attention, by the names of transformers."""

    def layer_types(self, config: Config) -> Sequence[str]:
        """See DecoderAdapter."""
        if config.get("layer_types") is not None:
            return super().layer_types(config)
        interval = read_size({"full_attention_interval": 4, **config}, "full_attention_interval")
        return tuple(
            "linear_attention" if (i + 1) % interval else "full_attention"
            for i in range(read_size(config, "num_hidden_layers", 10_000))
        )

    def recurrent_states(self, config: Config) -> Sequence[StateShape]:
        """See DecoderAdapter: the last inputs of the convolution, then key dimensions times value
        dimensions of each head.
        """
        width, key_dim, key_heads, value_heads, value_dim = (
            read_size(config, key) for key in LINEAR_SIZES
        )
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        return (
            StateShape((channels, width)),
            StateShape((value_heads, key_dim, value_dim), float32=True),
        )

    def layout(self, config: Config) -> Layout:
        """See ModelAdapter."""
        return replace(super().layout(config), mixer=mixer)

    def mixer_parameters(self, config: Config, layer_idx: int) -> Iterator[str]:
        """See QwenMoe."""
        if self.layer_types(config)[layer_idx] == "linear_attention":
            yield from ("linear_attn.dt_bias", "linear_attn.A_log")
            for leaf in ("conv1d", *self.projections, "norm", "out_proj"):
                yield f"linear_attn.{leaf}.weight"
        else:
            yield from super().mixer_parameters(config, layer_idx)

    def router_parameters(self) -> Iterator[str]:
        """See QwenMoe: beside the router, an expert that every token goes to."""
        yield from ("gate.weight", "shared_expert_gate.weight")
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            yield f"shared_expert.{leaf}.weight"

    def ignores(self, config: Config, tensor: str) -> bool:
        """See DecoderAdapter: the layer that predicts a further token is not used."""
        return tensor.startswith("mtp.")


def mixer(layer: nn.Module, hidden: Tensor, **options: Any) -> Tensor:
    """The first half of a layer, [R, T, C] -> the same: the norm, one kind of attention or the
    other, and the residual.
    """
    parts = dict(layer.named_children())
    normed = parts["input_layernorm"](hidden)
    if "linear_attn" in parts:
        cache, mask = options["past_key_values"], options["attention_mask"]
        mixed = parts["linear_attn"](hidden_states=normed, cache_params=cache, attention_mask=mask)
    else:
        mixed = parts["self_attn"](hidden_states=normed, **options)[0]
    output: Tensor = hidden + mixed
    return output
