"""The Llama family: Llama 3.x, SmolLM2 and every other model of `model_type` llama."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ollm_adapter_llama.catalog import entries, tiny
from ollm_core import (
    CacheKind,
    CatalogEntry,
    CheckpointError,
    Config,
    ConfigError,
    Layout,
    ModelAdapter,
    ParameterSource,
    UnsupportedError,
    WeightPlan,
    hookimpl,
)

_MAX_SIZE = 1 << 31
_MAX_LAYERS = 10_000
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class LlamaAdapter(ModelAdapter):
    """Dense decoder: grouped-query attention and gated MLP, both before-normed."""

    name = "llama"
    model_types = ("llama",)

    def catalog(self) -> Sequence[CatalogEntry]:
        """Llama 3.1 8B, Llama 3.2 1B and 3B, and SmolLM2 135M, all instruct models."""
        return entries()

    def layout(self, config: Config) -> Layout:
        """transformers' own Llama tree. Raises ConfigError; UnsupportedError for a rope type."""
        for key in ("vocab_size", "hidden_size", "intermediate_size"):
            _size(config, key)
        heads, kv_heads, _ = _heads(config)
        if heads % kv_heads:
            raise _bad("num_attention_heads", heads, f"a multiple of {kv_heads} key-value heads")
        _check_rope(config)
        return Layout(num_layers=_size(config, "num_hidden_layers", _MAX_LAYERS))

    def weights(self, config: Config, tensor_names: Iterable[str]) -> WeightPlan:
        """Each parameter is the tensor of the same name; a tied head is the embedding's."""
        present = frozenset(tensor_names)
        sources = {name: name for name in _parameter_names(config)}
        if config.get("tie_word_embeddings", False):
            sources[_HEAD] = _EMBEDDING
        used = frozenset(sources.values())
        if missing := sorted(used - present):
            raise CheckpointError(
                f"the checkpoint lacks tensor {missing[0]} ({len(missing)} are missing in all)",
                hint="config.json and the checkpoint are of different models",
            )
        ignored = frozenset(
            name
            for name in present - used
            if name == _HEAD or name.endswith(".rotary_emb.inv_freq")
        )
        if foreign := sorted(present - used - ignored):
            raise CheckpointError(
                f"the checkpoint has tensor {foreign[0]!a}, which no Llama model has "
                f"({len(foreign)} such in all)",
                hint="quantised checkpoints and LoRA files are not supported",
            )
        parameters = {name: ParameterSource((tensor,)) for name, tensor in sources.items()}
        return WeightPlan(parameters, ignored)

    def caches(self, config: Config) -> Sequence[CacheKind]:
        """Every layer remembers all tokens."""
        _, kv_heads, head_dim = _heads(config)
        kind = CacheKind("full", num_kv_heads=kv_heads, head_dim=head_dim)
        return (kind,) * _size(config, "num_hidden_layers", _MAX_LAYERS)

    def tiny_config(self) -> Config:
        """Grouped queries, a head dimension of its own, scaled rotary frequencies, all biases."""
        return tiny()


@hookimpl
def ollm_adapters() -> Sequence[ModelAdapter]:
    """The one adapter of this distribution."""
    return (LlamaAdapter(),)


def _parameter_names(config: Config) -> list[str]:
    """Every parameter of transformers' LlamaForCausalLM."""
    biased = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    has_bias = {"self_attn": config.get("attention_bias"), "mlp": config.get("mlp_bias")}
    leaves = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    for part, projections in biased.items():
        kinds = ("weight", "bias") if has_bias[part] else ("weight",)
        leaves += [f"{part}.{projection}.{kind}" for projection in projections for kind in kinds]
    layers = range(_size(config, "num_hidden_layers", _MAX_LAYERS))
    in_layers = [f"model.layers.{i}.{leaf}" for i in layers for leaf in leaves]
    return [_EMBEDDING, *in_layers, "model.norm.weight", _HEAD]


def _heads(config: Config) -> tuple[int, int, int]:
    """Query heads, key-value heads, head dimension."""
    heads = _size(config, "num_attention_heads")
    kv_heads = heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = _size(config, "num_key_value_heads")
    if config.get("head_dim") is not None:
        return heads, kv_heads, _size(config, "head_dim")
    hidden = _size(config, "hidden_size")
    if hidden % heads:
        raise _bad("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}")
    return heads, kv_heads, hidden // heads


def _check_rope(config: Config) -> None:
    """transformers 4 writes `rope_scaling`, which wins over the `rope_parameters` that 5 writes."""
    rope: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise _bad("rope_scaling", rope, "an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"rope type {rope_type} is not supported: its frequencies depend on the longest "
            "position so far, so a prompt in chunks would give another result",
            hint=f"use a model with one of {', '.join(_ROPE_TYPES)}",
        )
    if rope_type not in _ROPE_TYPES:
        raise _bad("rope_type", rope_type, f"one of {', '.join(_ROPE_TYPES)}")


def _size(config: Config, key: str, largest: int = _MAX_SIZE) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= largest:  # a bool is an int, but not a size
        raise _bad(key, value, f"an integer from 1 to {largest}")
    return value


def _bad(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"config.json: {key} must be {expected}, got {ascii(value)[:80]}",
        hint="fetch the model's config.json again",
    )
