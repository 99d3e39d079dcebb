"""What the Qwen mixtures of experts have in common. Free of torch until a model is opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ollm_core import Config, DecoderAdapter, Layout, ParameterSource, bad_config, read_size

if TYPE_CHECKING:
    from torch import Tensor

_MAX_EXPERTS = 1 << 14
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class QwenMoe(DecoderAdapter):
    """A decoder whose layers have routed experts, stored as three tensors each, save those that
    are dense.
    """

    sizes: tuple[str, ...] = ("vocab_size", "hidden_size", "num_experts_per_tok")
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")

    def mixer_parameters(self, config: Config, layer_idx: int) -> Iterator[str]:
        """Names of the parameters of one layer's attention."""
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"self_attn.{leaf}.weight"
            if config.get("attention_bias"):
                yield f"self_attn.{leaf}.bias"
        yield from ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

    def router_parameters(self) -> Iterable[str]:
        """Names of the parameters of a layer's MLP that are used for every token."""
        return ("gate.weight",)

    def layout(self, config: Config) -> Layout:
        """See ModelAdapter."""
        self.num_experts(config)
        return replace(super().layout(config), experts="mlp.experts")

    def layer_parameters(self, config: Config, layer_idx: int) -> Iterator[str]:
        """See DecoderAdapter."""
        yield from ("input_layernorm.weight", "post_attention_layernorm.weight")
        yield from self.mixer_parameters(config, layer_idx)
        if self.is_dense(config, layer_idx):
            yield from (f"mlp.{leaf}.weight" for leaf in _PROJECTIONS)
        else:
            yield from (f"mlp.{leaf}" for leaf in self.router_parameters())
            yield from ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

    def experts(self, config: Config, parameter: str) -> Sequence[ParameterSource]:
        """See DecoderAdapter."""
        path, _, leaf = parameter.rpartition(".")
        if not path.endswith(".mlp.experts"):
            return ()
        paths = [f"{path}.{number}" for number in range(self.num_experts(config))]
        if leaf == "down_proj":
            return [ParameterSource((f"{one}.down_proj.weight",)) for one in paths]
        return [
            ParameterSource((f"{one}.gate_proj.weight", f"{one}.up_proj.weight"), gate_above_up)
            for one in paths
        ]

    def num_experts(self, config: Config) -> int:
        """Routed experts of a layer; transformers writes Qwen3-MoE's by another name."""
        key = "num_local_experts" if "num_local_experts" in config else "num_experts"
        return read_size(config, key, _MAX_EXPERTS)

    def is_dense(self, config: Config, layer_idx: int) -> bool:
        """Whether a layer has no experts."""
        dense = config.get("mlp_only_layers") or ()
        if not isinstance(dense, (list, tuple)):
            raise bad_config("mlp_only_layers", dense, "a list of layers")
        step = read_size({"decoder_sparse_step": 1, **config}, "decoder_sparse_step")
        return layer_idx in dense or (layer_idx + 1) % step != 0


def gate_above_up(gate: Tensor, up: Tensor) -> Tensor:
    """[I, C] and [I, C] -> [2 I, C], as transformers keeps them."""
    import torch

    return torch.cat([gate, up])
