"""Which layers of a config stand for all of them, and the config with those alone."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from ollm_core import Config

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names for the number of decoder layers; a config uses one."""
_PERIOD = re.compile(r"(interval|period|pattern|_step|_freq|frequency)$")
_FROM_LAYER = re.compile(r"^(max_window_layers|num_dense_layers|first_k_\w+)$")
_MOST_IN_A_PERIOD = 16


def layer_count(config: Config) -> int:
    """Decoder layers of a text config; 0 where it does not say."""
    found = (config.get(key) for key in COUNT_KEYS)
    return next((count for count in found if is_size(count)), 0)


def is_size(value: object) -> TypeGuard[int]:
    """Whether a value of a config is a positive integer."""
    return type(value) is int and value > 0


def layers_kept(config: Config, least: int) -> list[int]:
    """At least `least` layers of a text config, all where it has fewer: whole periods from the
    first on, and one of each kind that comes later.
    """
    count = layer_count(config)
    period = math.lcm(*_periods(config, count))
    num_first = -(-least // period) * period if period <= _MOST_IN_A_PERIOD else least
    kinds = [_kind(config, count, i) for i in range(count)]
    kept = list(range(min(num_first, count)))
    seen = {kinds[i] for i in kept}
    for layer_idx in range(len(kept), count):
        if kinds[layer_idx] not in seen:
            seen.add(kinds[layer_idx])
            kept.append(layer_idx)
    return kept


def with_layers(config: Config, kept: Sequence[int]) -> dict[str, Any]:
    """A text config with the layers `kept` alone: lists that go by layer are cut, layers that are
    named get their new numbers, and where something begins at a layer it still does.
    """
    count, changed = layer_count(config), copy.deepcopy(dict(config))
    for key, value in changed.items():
        if key in COUNT_KEYS and value == count:
            changed[key] = len(kept)
        elif _goes_by_layer(key, value, count):
            changed[key] = [value[i] for i in kept]
        elif _names_layers(key, value, count):
            changed[key] = [i for i, layer_idx in enumerate(kept) if layer_idx in value]
        elif _FROM_LAYER.match(key) and type(value) is int:
            changed[key] = sum(layer_idx < value for layer_idx in kept)
    return changed


def _kind(config: Config, count: int, layer_idx: int) -> tuple[Any, ...]:
    """What tells a layer from others, periods aside."""
    found: list[Any] = []
    for key, value in config.items():
        if _goes_by_layer(key, value, count):
            found.append(repr(value[layer_idx]))
        elif _names_layers(key, value, count):
            found.append(layer_idx in value)
        elif _FROM_LAYER.match(key) and type(value) is int:
            found.append(layer_idx < value)
    return tuple(found)


def _periods(config: Config, count: int) -> Iterable[int]:
    """After how many layers each list repeats, and the periods that are numbers."""
    for key, value in config.items():
        if _goes_by_layer(key, value, count):
            repeats = (n for n in range(1, count) if value[n:] == value[:-n])
            period = next(repeats, count)
            if period <= _MOST_IN_A_PERIOD:
                yield period
        elif _PERIOD.search(key) and is_size(value):
            yield min(value, max(count, 1))


def _goes_by_layer(key: str, value: object, count: int) -> bool:
    if not isinstance(value, list) or len(value) != count or not count:
        return False
    return ("layer" in key or count > 4) and not _names_layers(key, value, count)


def _names_layers(key: str, value: object, count: int) -> bool:
    """Numbers of layers in order, as in `mlp_only_layers`. All zeros and ones go by layer."""
    if not isinstance(value, list) or "layer" not in key:
        return False
    numbers = all(type(one) is int and 0 <= one < count for one in value)
    return numbers and value == sorted(set(value))
