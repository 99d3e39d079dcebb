"""Configs that leave a key out, and what transformers takes them for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ollm_conformance.features import computes_nothing
from ollm_conformance.layer_cut import COUNT_KEYS
from ollm_conformance.models import text_view
from ollm_conformance.small import (
    EXPERT_COUNTS,
    EXPERTS_CHOSEN,
    HEADS,
    HIDDEN,
    INNER,
    LINEAR_DIMS,
    LINEAR_HEADS,
)
from ollm_core import Config

_PARTS = ("text_config", "rope_parameters", "rope_scaling")
_SIZES = {
    *COUNT_KEYS, *HIDDEN, *HEADS, *EXPERT_COUNTS, *EXPERTS_CHOSEN, *LINEAR_HEADS, *LINEAR_DIMS,
    "linear_conv_kernel_dim", "text_config", "vocab_size",
}  # fmt: skip
_ALWAYS_STATED = {"model_type", "quant_method", "dtype", "torch_dtype"}
_TIE = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Shortened:
    """A config without one of its keys."""

    key: str
    """Its path, as `rope_parameters.factor`."""
    config: dict[str, Any]

    @property
    def is_size(self) -> bool:
        """Whether what is left out is a size, without which a config is of no model in particular:
        an adapter may refuse it. KV heads and head dimensions often go unstated, and are none.
        """
        leaf = self.key.rpartition(".")[2]
        return leaf in _SIZES or bool(INNER.search(leaf))


def shortened(config: Config) -> Iterator[Shortened]:
    """`config` without each of its keys in turn, those inside rotary and text parts too."""
    for path in _paths(config):
        yield Shortened(path, left_out(config, path))


def left_out(config: Config, path: str) -> dict[str, Any]:
    """`config` without the key at `path`, in words as of `Shortened.key`."""
    key, _, rest = path.partition(".")
    changed = copy.deepcopy(dict(config))
    if rest:
        changed[key] = left_out(changed[key], rest)
    else:
        changed.pop(key, None)
    return changed


def taken_for(config: Config) -> dict[str, Any] | None:
    """What transformers' config class makes of the text of a config, save what no trained model
    computes with; None where it refuses.
    """
    try:
        told = text_view(config)
    except Exception:  # noqa: BLE001 - whatever it says of such a config
        return None
    return {key: value for key, value in told.items() if not computes_nothing(key)}


def first_difference(expected: Config, got: Config) -> str | None:
    """Where two config classes' words differ, a tied head aside: that is seen in the plan."""
    for key, value in expected.items():
        if key != _TIE and got.get(key) != value:
            return f"{key}: expected {value!r}, got {got.get(key)!r}"
    return None


def _paths(config: Config, inside: str = "") -> Iterator[str]:
    for key, value in config.items():
        if key not in _ALWAYS_STATED:
            yield f"{inside}{key}"
        if (key in _PARTS or inside) and isinstance(value, Mapping):
            yield from _paths(value, f"{inside}{key}.")
