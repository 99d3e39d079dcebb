"""gpt-oss: OpenAI's mixtures of experts, packed as MXFP4 as published, or in plain floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ollm_adapter_gpt_oss.catalog import entries, tiny
from ollm_core import (
    CatalogEntry,
    Config,
    DecoderAdapter,
    Layout,
    ModelAdapter,
    ParameterSource,
    UnsupportedError,
    bad_config,
    hookimpl,
    read_size,
)

_EXPERTS = "mlp.experts"
_STACKS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_MAX_EXPERTS = 1 << 14


class GptOssAdapter(DecoderAdapter):
    """Attention with sinks, every other layer with a window; stacked experts with biases, read row
    by row.
    """

    name = "gpt-oss"
    model_types = ("gpt_oss",)
    quantizations = ("mxfp4",)
    unstated_dtype = "bfloat16"
    defaults = MappingProxyType(
        {
            "attention_bias": True,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "sliding_window": 128,
        }
    )

    def catalog(self) -> Sequence[CatalogEntry]:
        """gpt-oss 20B and 120B."""
        return entries()

    def layout(self, config: Config) -> Layout:
        """Routed experts at `mlp.experts`. Raises UnsupportedError for another quantisation."""
        self._is_packed(config)
        return replace(super().layout(config), experts=_EXPERTS)

    def layer_parameters(self, config: Config, layer_idx: int) -> Iterator[str]:
        """Those of transformers' GptOssDecoderLayer."""
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        yield "self_attn.sinks"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{projection}.weight"
            if config.get("attention_bias"):
                yield f"self_attn.{projection}.bias"
        yield from ("mlp.router.weight", "mlp.router.bias")
        for leaf in _STACKS:
            yield f"{_EXPERTS}.{leaf}"

    def layer_types(self, config: Config) -> Sequence[str]:
        """As listed; where nothing is, sliding and full ones in turn."""
        if config.get("layer_types") is not None:
            return super().layer_types(config)
        whole = super().layer_types({**config, "sliding_window": None})
        return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(len(whole)))

    def experts(self, config: Config, parameter: str) -> Sequence[ParameterSource]:
        """A row of each stack for each expert, whatever form the stack is stored in."""
        if not parameter.rpartition(".")[0].endswith(f".{_EXPERTS}"):
            return ()
        key = "num_experts" if "num_experts" in config else "num_local_experts"
        rows = range(read_size(config, key, _MAX_EXPERTS))
        if self._is_packed(config):
            for size_key in ("hidden_size", "intermediate_size"):
                if (size := read_size(config, size_key)) % 32:
                    raise bad_config(size_key, size, "a multiple of 32, as mxfp4 has it")
        return [ParameterSource((parameter,), row=row) for row in rows]

    def tiny_config(self) -> Config:
        """MXFP4, sinks, both kinds of layers, YaRN, biases, and a gate that is clamped."""
        return tiny()

    @staticmethod
    def _is_packed(config: Config) -> bool:
        found: Any = config.get("quantization_config")
        if found is None:
            return False
        if not isinstance(found, Mapping):
            raise bad_config("quantization_config", found, "an object")
        if found.get("quant_method") != "mxfp4":
            raise UnsupportedError(
                f"config.json: quant_method {ascii(found.get('quant_method'))[:80]} is not "
                "supported",
                hint="gpt-oss opens as mxfp4, which is how it was published, and not quantised",
            )
        return True


@hookimpl
def ollm_adapters() -> Sequence[ModelAdapter]:
    """The one adapter of this distribution."""
    return (GptOssAdapter(),)
