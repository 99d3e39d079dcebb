"""The Llama family: Llama 2 and 3.x, SmolLM2 and every other model of `model_type` llama."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ollm_adapter_llama.catalog import entries, tiny
from ollm_core import CatalogEntry, Config, DecoderAdapter, ModelAdapter, hookimpl


class LlamaAdapter(DecoderAdapter):
    """Dense decoder: grouped-query attention and gated MLP, both before-normed."""

    name = "llama"
    model_types = ("llama",)

    def catalog(self) -> Sequence[CatalogEntry]:
        """Llama 3.2 1B and 3B, 3.1 8B and 405B, 2 70B, and SmolLM2 135M, all instruct models."""
        return entries()

    def layer_parameters(self, config: Config, layer_idx: int) -> Iterator[str]:
        """Those of transformers' LlamaDecoderLayer; biases as the config has them."""
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{projection}.weight"
            if config.get("attention_bias"):
                yield f"self_attn.{projection}.bias"
        for projection in ("gate_proj", "up_proj", "down_proj"):
            yield f"mlp.{projection}.weight"
            if config.get("mlp_bias"):
                yield f"mlp.{projection}.bias"

    def layer_types(self, config: Config) -> Sequence[str]:
        """No Llama has windows, whatever its config says."""
        return super().layer_types({**config, "layer_types": None, "sliding_window": None})

    def tiny_config(self) -> Config:
        """Grouped queries, a head dimension of its own, scaled rotary frequencies, all biases."""
        return tiny()


@hookimpl
def ollm_adapters() -> Sequence[ModelAdapter]:
    """The one adapter of this distribution."""
    return (LlamaAdapter(),)
