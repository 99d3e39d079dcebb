"""What transformers can tell of a model of any size without its weights, on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ollm_conformance.kinds import kind_of, same_shapes
from ollm_conformance.layer_cut import with_layers
from ollm_core import CacheKind, Config


def same_full_size(declared: Sequence[CacheKind], config: Config, what: str) -> None:
    """Raises AssertionError unless the declared caches have the heads, or the states, of those in
    transformers. Says nothing of a family that transformers cannot run without data.
    """
    try:
        layers = filled_layers(config)
    except (NotImplementedError, RuntimeError):
        return
    for layer in layers:
        for layer_idx, kind in enumerate(declared):
            if (kind.kind, kind.window) == kind_of(layer):
                same_shapes(kind, layer, f"{what}: layer {layer_idx}")


def filled_layers(config: Config) -> list[Any]:
    """A layer of each kind of a model's cache in bfloat16, after a token has gone through those
    layers alone. Raises what transformers raises where it cannot run such a model.

    `config` is a text config as transformers' config class tells it.
    """
    first: dict[tuple[str, int | None], int] = {}
    for layer_idx, layer in enumerate(DynamicCache(config=_plain(config)).layers):
        first.setdefault(kind_of(layer), layer_idx)
    known = _plain(with_layers(config, sorted(first.values())))
    cache = DynamicCache(config=known)
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(
            known,
            dtype=torch.bfloat16,
            attn_implementation="eager",
            experts_implementation="batched_mm",  # which asks no router for its choice
            trust_remote_code=False,
        )
        ids = torch.zeros(1, 1, dtype=torch.long)
        model.eval()(input_ids=ids, past_key_values=cache, use_cache=True)
    return list(cache.layers)


def _plain(config: Config) -> Any:
    """The configuration object of a model without packed weights."""
    return AutoConfig.for_model(
        **{key: value for key, value in config.items() if key != "quantization_config"}
    )
