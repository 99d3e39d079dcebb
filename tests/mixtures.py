"""Tiny mixtures of experts of four families, and the adapters that open them."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import ollm
from ollm_core import DecoderAdapter, ParameterSource
from ollm_core.plugins.registry import Registry


def fused(gate, up):
    """The rows of the gate, then those of the other half."""
    return torch.cat([gate, up])


ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
QUERY_NORMS = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
SHARED = ["mlp.shared_expert_gate.weight", *(f.replace("mlp", "mlp.shared_expert") for f in DENSE)]


class MoeAdapter(DecoderAdapter):
    """What the families below share: a tensor for each expert and projection."""

    projections = ("gate_proj", "up_proj", "down_proj")
    stored_mlp = "mlp"
    stacked = False
    layer_extra: tuple[str, ...] = ()
    moe_extra: tuple[str, ...] = ()

    def layout(self, config):
        return replace(super().layout(config), experts="mlp.experts")

    def layer_parameters(self, config, layer_idx):
        dense = layer_idx in config.get("mlp_only_layers", ())
        mlp = DENSE if dense else ["mlp.gate.weight", *EXPERTS, *self.moe_extra]
        return [*ATTENTION, *NORMS, *self.layer_extra, *mlp]

    def source(self, config, parameter):
        return ParameterSource((parameter.replace(".mlp.", f".{self.stored_mlp}."),))

    def experts(self, config, parameter):
        path, _, leaf = parameter.rpartition(".")
        if not path.endswith("mlp.experts"):
            return ()
        count = config.get("num_local_experts") or config["num_experts"]
        if self.stacked:
            return [ParameterSource((parameter,), row=i) for i in range(count)]
        gate, up, down = self.projections
        path = path.replace(".mlp.", f".{self.stored_mlp}.")
        if leaf == "down_proj":
            return [ParameterSource((f"{path}.{i}.{down}.weight",)) for i in range(count)]
        return [
            ParameterSource((f"{path}.{i}.{gate}.weight", f"{path}.{i}.{up}.weight"), fused)
            for i in range(count)
        ]

    def tiny_config(self):
        return FAMILIES[self.name][1].to_dict()


class Mixtral(MoeAdapter):
    """Mixtral: its files have other names than its module tree."""

    name = "mixtral"
    model_types = ("mixtral",)
    projections = ("w1", "w3", "w2")
    stored_mlp = "block_sparse_moe"


class Qwen3Moe(MoeAdapter):
    """Qwen3-MoE: many small experts, some layers dense."""

    name = "qwen3_moe"
    model_types = ("qwen3_moe",)
    layer_extra = tuple(QUERY_NORMS)


class StackedQwen3Moe(Qwen3Moe):
    """The same, stored as the module tree has it: all experts of a layer in one tensor."""

    stacked = True


class Qwen2Moe(MoeAdapter):
    """Qwen2-MoE: a shared expert beside the routed ones, and biases in attention."""

    name = "qwen2_moe"
    model_types = ("qwen2_moe",)
    layer_extra = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
    moe_extra = tuple(SHARED)


class GptOss(MoeAdapter):
    """gpt-oss, not quantised: stacked experts with biases and a gate of its own, a router of
    another name, sinks, and windows in every second layer.
    """

    name = "gpt_oss"
    model_types = ("gpt_oss",)
    stacked = True
    layer_extra = (
        "self_attn.sinks",
        *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    )

    def layer_parameters(self, config, layer_idx):
        stacks = [name + suffix for name in EXPERTS for suffix in ("", "_bias")]
        router = ["mlp.router.weight", "mlp.router.bias"]
        return [*ATTENTION, *NORMS, *self.layer_extra, *router, *stacks]


COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "mixtral": (
        Mixtral,
        MixtralConfig(**COMMON, intermediate_size=96, num_local_experts=6, sliding_window=None),
    ),
    "qwen3_moe": (
        Qwen3Moe,
        Qwen3MoeConfig(
            **COMMON | {"num_experts_per_tok": 3},
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=16,
            mlp_only_layers=[1],
            norm_topk_prob=True,
        ),
    ),
    "qwen2_moe": (
        Qwen2Moe,
        Qwen2MoeConfig(
            **COMMON,
            intermediate_size=96,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            num_experts=8,
        ),
    ),
}
FAMILIES["gpt_oss"] = (
    GptOss,
    GptOssConfig(
        **COMMON,
        intermediate_size=48,
        num_local_experts=6,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
)
BOTH = ["mixtral", "qwen3_moe"]


def write_moe(directory, family, dtype=torch.float32, *, shard="1GB", **changes):
    """Write a random checkpoint of a family; returns its directory."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**FAMILIES[family][1].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.config.dtype = dtype
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def open_moe(directory, adapter=None, **options):
    """Open a checkpoint with the adapter for it."""
    family = json.loads((directory / "config.json").read_text())["model_type"]
    adapter = adapter or FAMILIES[family][0]()
    options = {"device": "cpu", "attention": "exact", "registry": Registry.of(adapter)} | options
    return ollm.load(directory, **options)


class Plain:
    """An un-offloaded model that goes on from call to call, and what its routers choose."""

    def __init__(self, reference):
        self.model = reference.model
        self.cache = DynamicCache(config=self.model.config)
        self.chosen = set()
        for layer_idx, layer in enumerate(self.model.model.layers):
            if router := dict(layer.named_modules()).get("mlp.gate"):
                router.register_forward_hook(
                    lambda _, __, output, i=layer_idx: self.chosen.update(
                        (i, expert) for expert in output[2].flatten().tolist()
                    )
                )

    @torch.no_grad()
    def __call__(self, ids, chunk_size):
        """Logits [R, T, V] of the next tokens [R, T], and the (layer, expert) pairs chosen."""
        self.chosen = set()
        found = [
            self.model(input_ids=chunk, past_key_values=self.cache, use_cache=True).logits
            for chunk in ids.split(chunk_size, dim=1)
        ]
        return torch.cat(found, dim=1), self.chosen
