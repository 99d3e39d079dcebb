"""Random configs of a family: its tiny config with other flags, sizes, ratios and lists, all that
its config class has, many at a time.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ollm_conformance.features import computes_nothing
from ollm_conformance.layer_cut import COUNT_KEYS, is_size, layer_count, with_layers
from ollm_conformance.models import text_view
from ollm_conformance.small import (
    EXPERT_COUNTS,
    EXPERTS_CHOSEN,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LINEAR_DIMS,
    LINEAR_HEADS,
)
from ollm_core import Config

_LAYERS = (1, 2, 4, 5, 11)
_HEADS = ((1, 1), (2, 1), (3, 3), (4, 2), (6, 2), (8, 1))
"""Query and KV heads: equal, one for all, and groups of two, three and eight."""
_HEAD_DIMS = (16, 24, 32, 40)
_INNER = (24, 57, 64, 103, 160)
_EXPERTS = ((4, 1), (3, 3), (11, 2), (13, 4))
"""Experts, and how many are chosen: one, all, and numbers of two digits."""
_VOCABULARIES = (67, 256, 331)
_LINEAR_HEADS = ((1, 1), (1, 3), (2, 4), (3, 3))
_NUMBERS: Mapping[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1, 2, 3),
    "first_k_dense_replace": (0, 1),
    "full_attention_interval": (1, 2, 3),
    "linear_conv_kernel_dim": (2, 3, 5),
    "no_rope_layer_interval": (2, 3),
    "partial_rotary_factor": (0.25, 0.5, 1.0),
    "rms_norm_eps": (1e-6, 1e-5, 0.1),
    "rope_theta": (100.0, 10_000.0, 5_000_000.0),
    "sliding_window": (3, 40, 290),
    "sliding_window_pattern": (2, 3),
    "topk_group": (1,),
}
"""Values of keys for which half and double of the tiny config's say little."""
_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
_LEFT_OUT = ("layer_types", "sliding_window")
"""Keys that published configs often leave out, and for which a family has a rule then."""
_MOST_USUAL_HEADS = 8
Changes = Mapping[str, Any]
"""Key to its value, or to LEFT_OUT."""
LEFT_OUT = object()


@dataclass(frozen=True, slots=True)
class Dealt:
    """Some changes of a config: `groups` of them, each of keys that go together."""

    groups: tuple[Changes, ...]

    def applied(self, config: Config) -> dict[str, Any]:
        """`config` with all of them."""
        changed = copy.deepcopy(dict(config))
        if isinstance(inner := changed.get("text_config"), Mapping):
            return {**changed, "text_config": self.applied(inner)}
        merged = {key: value for group in self.groups for key, value in group.items()}
        for key in COUNT_KEYS:
            if key in merged:
                count = layer_count(changed)
                kept = [i % count for i in range(merged[key])]
                changed = with_layers(changed, kept)
                changed["mlp_only_layers"] = merged.get("mlp_only_layers", [])
        for key, value in merged.items():
            if value is LEFT_OUT:
                changed.pop(key, None)
            elif key == "layer_types":
                changed[key] = [value[i % len(value)] for i in range(layer_count(changed))]
            elif key == "mlp_only_layers":
                changed[key] = [one for one in value if one < layer_count(changed)]
            else:
                changed[key] = value
        if "mlp_only_layers" not in config and "mlp_only_layers" not in merged:
            changed.pop("mlp_only_layers", None)
        return changed

    def without(self, number: int) -> Dealt:
        """The others."""
        return Dealt(self.groups[:number] + self.groups[number + 1 :])

    def __str__(self) -> str:
        merged = {key: value for group in self.groups for key, value in group.items()}
        return ", ".join(
            f"{key} left out" if value is LEFT_OUT else f"{key} = {value!r}"
            for key, value in sorted(merged.items())
        )


def _square(config: Config) -> Dealt:
    hidden = next((config[key] for key in HIDDEN if is_size(config.get(key))), None)
    inner = [key for key, value in config.items() if INNER.search(key) and is_size(value)]
    return Dealt((dict.fromkeys(inner, hidden),) if hidden and inner else ())


def only_sizes(group: Changes) -> bool:
    """Whether a group changes how large a model is, and nothing else."""
    return bool(group) and all(is_size(group[key]) and key not in _NUMBERS for key in group)


def deal(config: Config, draw: random.Random, num_all: int, num_few: int) -> list[Dealt]:
    """`num_all` of them with a value of every group: together they have as many values of each as
    so many can. Then `num_few`, among which the groups are dealt out, so that what one value does
    is not hidden by another's. Then one whose MLPs are as wide as the model, which a transform may
    take for another thing.
    """
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    hands: list[list[Changes]] = [[] for _ in range(num_all + num_few)]
    groups = [values for values in _groups(text, text_view(config), draw) if values]
    draw.shuffle(groups)
    for number, values in enumerate(groups):
        deck = [values[i % len(values)] for i in range(max(num_all, len(values)))]
        draw.shuffle(deck)
        for hand, one in zip(hands[:num_all], deck, strict=False):
            hand.append(one)
        hands[num_all + number % num_few].append(deck[-1])
    return [Dealt(tuple(hand)) for hand in hands] + [_square(text)]


def _groups(config: Config, known: Config, draw: random.Random) -> Iterator[list[Changes]]:
    """The values of each group of keys. `known` is `config` with what it leaves out filled in."""
    yield from _widths(config, known)
    for key in COUNT_KEYS:
        if is_size(config.get(key)):
            yield [{key: number} for number in _LAYERS]
    for keys, chosen in ((EXPERT_COUNTS, EXPERTS_CHOSEN),):
        stated = [key for key in keys if is_size(config.get(key))]
        picked = [key for key in chosen if is_size(config.get(key))]
        if stated:
            yield [
                dict.fromkeys(stated, count) | dict.fromkeys(picked, number)
                for count, number in _EXPERTS
            ]
    if is_size(known.get(LINEAR_HEADS[0])):
        yield [dict(zip(LINEAR_HEADS, heads, strict=True)) for heads in _LINEAR_HEADS]
        yield [dict(zip(LINEAR_DIMS, dims, strict=True)) for dims in ((8, 24), (16, 16), (24, 8))]
    yield from _ropes(config, known)
    if isinstance(known.get("layer_types"), (list, tuple)):  # before which a stated rule is nothing
        yield [{}, {"full_attention_interval": 3}, {"sliding_window_pattern": 3}]
    if known.get("max_window_layers") is not None and known.get("sliding_window") is not None:
        rule = {"layer_types": LEFT_OUT, "use_sliding_window": True}
        yield [rule | {"max_window_layers": first} for first in (0, 1, 2)]
    for key in sorted({*known, *(_NUMBERS.keys() & config.keys())}):
        if not computes_nothing(key):
            values = list(_values(key, config, known, draw))
            if values:
                yield [{key: value} for value in values]


def _widths(config: Config, known: Config) -> Iterator[list[Changes]]:
    """Heads, their size, and what follows from them; and widths inside an MLP."""
    unit = 32 if known.get("quantization_config") else 8
    if heads := list(_heads(config, known, unit)):
        yield heads
    inner = [key for key, value in config.items() if INNER.search(key) and is_size(value)]
    for key in inner:
        yield [{key: size} for size in _INNER if unit == 8 or size % unit == 0]
    if is_size(config.get("vocab_size")):
        special = [v for k, v in config.items() if k.endswith("_token_id") and type(v) is int]
        yield [{"vocab_size": n} for n in _VOCABULARIES if n > max(special, default=0)]


def _heads(config: Config, known: Config, unit: int) -> Iterator[Changes]:
    """Numbers and sizes of heads with a hidden size: as wide as all heads, wider, less wide; and
    each number left out that a rule of the family then gives.
    """
    heads_key, hidden_key, kv_key = (
        next((key for key in keys if is_size(config.get(key))), None)
        for keys in (HEADS, HIDDEN, KV_HEADS)
    )
    if heads_key is None or hidden_key is None:
        return
    own_dim = is_size(config.get("head_dim"))
    ropes = [known[key] for key in ("rope_scaling", "rope_parameters") if known.get(key)]
    fixed = own_dim and any(isinstance(r, Mapping) and r.get("mrope_section") for r in ropes)
    dims = (config["head_dim"],) if fixed else _HEAD_DIMS
    for number, (heads, kv_heads) in enumerate(_HEADS):
        dim = dims[number % len(dims)]
        hidden = heads * dim
        if own_dim:
            hidden = max((hidden + 8 * (number % 3 - 1) * (heads + 1)) // unit * unit, unit)
        if hidden % unit:
            continue
        sizes = {heads_key: heads, hidden_key: hidden}
        yield (
            sizes | ({kv_key: kv_heads} if kv_key else {}) | ({"head_dim": dim} if own_dim else {})
        )
    if own_dim and not fixed:
        yield {heads_key: 4, hidden_key: 64, "head_dim": LEFT_OUT} | _stated(kv_key, 2)
    usual = _usual(config, kv_key) if kv_key else None
    if kv_key and usual and usual <= _MOST_USUAL_HEADS:
        group = {heads_key: 2 * usual, hidden_key: 2 * usual * 16, kv_key: LEFT_OUT}
        yield group | _stated(own_dim and "head_dim", dims[0])


def _stated(key: str | Literal[False] | None, value: int) -> dict[str, Any]:
    """Nothing for a key that the family does not have."""
    return {key: value} if key else {}


def _usual(config: Config, key: str) -> int | None:
    """What a number is taken for where a config does not state it; None where that is a rule."""
    rest = {one: value for one, value in config.items() if one != key}
    try:
        found = text_view(rest).get(key)
    except Exception:  # noqa: BLE001 - whatever transformers says of such a config
        return None
    return found if is_size(found) else None


def _values(key: str, config: Config, known: Config, draw: random.Random) -> Iterator[Any]:
    """Those of one key by itself; LEFT_OUT among them."""
    value = known.get(key, config.get(key))
    if key in _LEFT_OUT and key in config:
        yield LEFT_OUT
    if key in _NUMBERS:
        if value is not None and (key in config or key not in ("rope_theta",)):
            yield from _NUMBERS[key]
    elif key in ("hidden_act", "hidden_activation"):
        yield from _ACTIVATIONS
    elif isinstance(value, bool):
        yield from (True, False)
    elif key == "layer_types" and isinstance(value, (list, tuple)) and len(set(value)) > 1:
        yield from _lists(sorted(set(value)), draw)
    elif key == "mlp_only_layers":
        yield from ([], [0], [1, 3], [2, 10])
    elif isinstance(value, float) and value > 0 and key in config:
        yield from (value / 2, value, value * 2)


def _ropes(config: Config, known: Config) -> Iterator[list[Changes]]:
    """The same rotary embedding in the words of transformers 5, alone and beside older ones."""
    rope = known.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_parameters" in config or "rope_theta" not in rope:
        return
    stated = {"rope_parameters": dict(rope)}
    older = {key: LEFT_OUT for key in ("rope_scaling", "rope_theta") if key in config}
    yield [{}, stated | older, stated | {"rope_scaling": LEFT_OUT}]


def _lists(kinds: Sequence[str], draw: random.Random) -> Iterator[list[str]]:
    """Kinds of layers, to be repeated: one alone, and in some order."""
    yield [draw.choice(kinds)]
    for length in (2, 3, 5):
        yield [*draw.sample(kinds, 2), *draw.choices(kinds, k=length - 2)]
