"""Configs made small: what a config.json says of a model, in sizes that run in a moment."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ollm_conformance.layer_cut import is_size, layer_count, layers_kept, with_layers
from ollm_core import Config

LAYERS = 12
"""Some numbers have two digits, and periods of 2, 3, 4 and 6 end with the last."""
FEW_LAYERS = 3
WINDOW = 20
"""Tokens of a small window: a short prompt crosses it."""
VOCABULARY = 330
"""No other small size."""
EXPERTS = 12
"""Kept at most, for one with a number of two digits."""

HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_CHOSEN = (
    "num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
)  # fmt: skip
EXPERT_GROUPS = ("n_group",)
INNER = re.compile(r"(^|_)(intermediate_size|n_inner|ffn_dim)(_mlp)?$")
_WINDOW = re.compile(r"^(sliding_window(_size)?|attention_window(_size)?|attention_chunk_size)$")
_TOKENS = re.compile(r"_token_(id|ids|index)$")
LINEAR_HEADS = ("linear_num_key_heads", "linear_num_value_heads")
LINEAR_DIMS = ("linear_key_head_dim", "linear_value_head_dim")
_ROPES = ("rope_scaling", "rope_parameters")
_LARGEST_GROUP = 16
_HEAD_DIMS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Widths:
    """The sizes that others follow."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    unit: int
    """Sizes between are multiples of it: mxfp4 packs 32 numbers together."""


def make_small(config: Config, layers: int = LAYERS) -> dict[str, Any]:
    """A config.json with small sizes and `layers` layers or a few more; what is not a size stays as
    it is, word for word.

    Kept: query heads to KV heads up to 16 to one, which of two widths is larger or that they are
    equal, tokens that are the same, every kind of layer and a period of them, and experts to
    experts chosen as far as 12 allow. Of a model that also sees, the language model is made small.
    A config that does not say its sizes by known names is returned as it is.
    """
    numbers = {token: number for number, token in enumerate(sorted(set(_token_ids(config))))}
    return _with_tokens(_with_sizes(config, layers), numbers)


def first_of(config: Config, keys: Iterable[str]) -> int | None:
    """The size that a config gives under one of `keys`."""
    found = (config.get(key) for key in keys)
    return next((value for value in found if is_size(value)), None)


def head_dim(config: Config) -> int | None:
    """The head dimension of a text config: as stated, or what the heads divide evenly."""
    if stated := first_of(config, ("head_dim",)):
        return stated
    hidden, heads = first_of(config, HIDDEN), first_of(config, HEADS)
    return hidden // heads if hidden and heads else None


def _with_sizes(config: Config, layers: int) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    if isinstance(changed.get("text_config"), dict):
        changed["text_config"] = _with_sizes(changed["text_config"], layers)
    if not layer_count(changed) or not first_of(changed, HIDDEN) or not first_of(changed, HEADS):
        return changed
    changed = with_layers(changed, layers_kept(changed, layers))
    widths = _widths(config)
    changed |= _attention_sizes(config, widths)
    changed |= _inner_sizes(changed, config, widths)
    changed |= _expert_counts(config)
    changed |= _linear_sizes(config)
    for key, value in changed.items():
        if _WINDOW.match(key) and is_size(value):
            changed[key] = min(value, WINDOW)
    if is_size(changed.get("vocab_size")):
        changed["vocab_size"] = min(changed["vocab_size"], VOCABULARY)
    return changed


def _widths(config: Config) -> Widths:
    hidden, heads = first_of(config, HIDDEN) or 1, first_of(config, HEADS) or 1
    kv_heads = first_of(config, KV_HEADS) or heads
    wide = heads * (head_dim(config) or 1)
    group = max(heads // kv_heads, 1)
    few = min(kv_heads, 2 if group > 1 else 4)
    many = few * min(group, _LARGEST_GROUP)
    quantized = config.get("quantization_config") is not None
    unit = 32 if quantized else 8
    for dim in _HEAD_DIMS:
        small = many * dim
        if wide == hidden:
            chosen = small
        elif wide < hidden:
            chosen = (small // unit + 1) * unit
        else:
            chosen = min(96, (small - 1) // unit * unit)
        if chosen > 0 and chosen % unit == 0 and _turns(config, dim):
            break
    return Widths(chosen, many, few, dim, unit)


def _turns(config: Config, dim: int) -> bool:
    """Whether rotary embeddings turn such heads at two frequencies at least, and at one for each
    axis that they split them by.
    """
    ropes = [config, *(config[key] for key in _ROPES if isinstance(config.get(key), Mapping))]
    part = min(float(rope.get("partial_rotary_factor") or 1) for rope in ropes)
    axes = max(len(rope.get("mrope_section") or ()) for rope in ropes)
    frequencies = dim * part / 2
    return frequencies == int(frequencies) and frequencies >= max(2, axes)


def _attention_sizes(config: Config, widths: Widths) -> dict[str, Any]:
    sizes = {HIDDEN: widths.hidden, HEADS: widths.heads, KV_HEADS: widths.kv_heads}
    changed: dict[str, Any] = {
        key: size for keys, size in sizes.items() for key in keys if is_size(config.get(key))
    }
    if is_size(config.get("head_dim")):
        changed["head_dim"] = widths.head_dim
    for key in _ROPES:
        rope = config.get(key)
        if isinstance(rope, Mapping) and isinstance(rope.get("mrope_section"), list):
            part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
            total = int(widths.head_dim * part) // 2
            section = _shared_out(rope["mrope_section"], total)
            changed[key] = {**copy.deepcopy(dict(rope)), "mrope_section": section}
    return changed


def _shared_out(parts: list[int], total: int) -> list[int]:
    """`parts` as numbers from one that make `total`, in about their proportions."""
    shares = [max(1, total * part // sum(parts)) for part in parts]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        off = [
            step * (part * total / sum(parts) - s) for part, s in zip(parts, shares, strict=True)
        ]
        shares[off.index(max(off))] += step
    return shares


def _inner_sizes(changed: Config, config: Config, widths: Widths) -> dict[str, Any]:
    """Widths inside an MLP: equal to the hidden size, above or below it, each a size of its own."""
    hidden = first_of(config, HIDDEN) or 1
    stated = {key: value for key, value in changed.items() if INNER.search(key)}
    sizes = {one for value in stated.values() for one in _listed(value) if is_size(one)}
    small = {hidden: widths.hidden}
    for place, size in enumerate(sorted(size for size in sizes if size > hidden), start=1):
        small[size] = widths.hidden + place * widths.unit * (2 if widths.unit < 32 else 1)
    for place, size in enumerate(sorted({s for s in sizes if s < hidden}, reverse=True), start=1):
        small[size] = max(widths.hidden - place * widths.unit, widths.unit)
    return {key: _mapped(value, small) for key, value in stated.items()}


def _expert_counts(config: Config) -> dict[str, Any]:
    count, chosen = first_of(config, EXPERT_COUNTS), first_of(config, EXPERTS_CHOSEN)
    if count is None:
        return {}
    groups = first_of(config, EXPERT_GROUPS) or 1
    few = min(count, -(-EXPERTS // groups) * groups)
    changed: dict[str, Any] = {
        key: few for key in EXPERT_COUNTS if is_size(config.get(key)) and config[key] == count
    }
    if chosen is not None:
        least = min(chosen, 2)
        small = max(least, round(few * chosen / count))
        changed |= {key: small for key in EXPERTS_CHOSEN if is_size(config.get(key))}
    return changed


def _linear_sizes(config: Config) -> dict[str, Any]:
    """Heads of linear attention in their ratio, and their dimensions, equal or not."""
    changed: dict[str, Any] = {}
    heads = [first_of(config, (key,)) or 0 for key in LINEAR_HEADS]
    if all(heads):
        least = min(2, *heads)
        ratio = max(heads) // min(heads)
        small = [least if count == min(heads) else least * ratio for count in heads]
        changed |= zip(LINEAR_HEADS, small, strict=True)
    dims = [first_of(config, (key,)) or 0 for key in LINEAR_DIMS]
    if all(dims):
        changed |= zip(LINEAR_DIMS, (8 if d == min(dims) else 12 for d in dims), strict=True)
    return changed


def _token_ids(value: object) -> Iterator[int]:
    """Every token that a config names, its parts included."""
    if not isinstance(value, Mapping):
        return
    for key, part in value.items():
        yield from _token_ids(part)
        if _TOKENS.search(key):
            yield from (one for one in _listed(part) if type(one) is int and one >= 0)


def _with_tokens(config: Config, numbers: Mapping[int, int]) -> dict[str, Any]:
    changed = dict(config)
    for key, value in changed.items():
        if isinstance(value, Mapping):
            changed[key] = _with_tokens(value, numbers)
        elif _TOKENS.search(key):
            changed[key] = _mapped(value, numbers)
    return changed


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _mapped(value: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_mapped(one, numbers) for one in value]
    return numbers.get(value, value) if type(value) is int else value
