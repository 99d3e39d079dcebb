"""What a config makes a model do, beside its sizes: what must be run for a run to show it works."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ollm_conformance.layer_cut import layer_count
from ollm_conformance.small import (
    EXPERTS_CHOSEN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LINEAR_DIMS,
    LINEAR_HEADS,
    first_of,
    head_dim,
)
from ollm_core import Config

_NOT_COMPUTED = re.compile(
    r"_token_(id|ids|index)$|dropout|^(_|id2label|label2id|output_|return_|router_aux_loss)"
    r"|^(architectures|chunk_size_feed_forward|dtype|initializer_range|is_encoder_decoder|language"
    r"|model_type|pretraining_tp|problem_type|torch_dtype|transformers_version|use_cache)$"
)


def computes_nothing(key: str) -> bool:
    """Whether a key of a config says nothing of what a trained model computes."""
    return bool(_NOT_COMPUTED.search(key))


def features(config: Config) -> set[str]:
    """Each flag, each name, what is set and what is not, multipliers that multiply, lists that name
    something, and ratios between sizes, as short sentences.

    `config` is a text config as transformers' config class tells it: every key is there.
    """
    return {*_stated("", config), *_ratios(config)}


def _stated(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not computes_nothing(key):
                yield from _stated(f"{path}.{key}" if path else key, part)
    elif isinstance(value, (list, tuple)):
        yield f"{path} {'names something' if value else 'is empty'}"
        yield from (f"{path} has {one}" for one in value if isinstance(one, str))
    elif value is None or isinstance(value, (bool, str)) or value in (0, 1):
        yield f"{path} is {'null' if value is None else value}"
    else:
        yield f"{path} is a number other than 0 and 1"


def _ratios(config: Config) -> Iterator[str]:
    heads, kv_heads = first_of(config, HEADS), first_of(config, KV_HEADS)
    hidden, dim = first_of(config, HIDDEN), head_dim(config)
    if layer_count(config) >= LAYERS:
        yield "layers whose number has two digits"
    if heads and kv_heads:
        group = heads // kv_heads
        yield "query heads per KV head: " + (str(group) if group < 3 else "more than 2")
    if heads and hidden and dim:
        yield f"width of all heads {_order(heads * dim, hidden)} hidden_size"
    if chosen := first_of(config, EXPERTS_CHOSEN):
        yield "experts for each token: " + ("1" if chosen == 1 else "several")
    for first, second in (LINEAR_HEADS, LINEAR_DIMS):
        one, other = first_of(config, (first,)), first_of(config, (second,))
        if one and other:
            yield f"{first} {_order(one, other)} {second}"
    for key, size in config.items():
        if hidden and key.endswith("intermediate_size") and type(size) is int:
            yield f"{key} {_order(size, hidden)} hidden_size"


def _order(one: int, other: int) -> str:
    return "equals" if one == other else "is above" if one > other else "is below"
