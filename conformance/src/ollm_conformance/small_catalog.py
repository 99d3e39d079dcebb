"""The models of a catalog, made small: what is run of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollm_conformance.small import make_small
from ollm_core import Config, ModelAdapter

_NOT_COMPUTED = ("architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True, slots=True)
class SmallEntry:
    """One small config, and the models of the catalog that it stands for."""

    ids: tuple[str, ...]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """For messages."""
        return f"{', '.join(self.ids)} made small"


def small_catalog(adapter: ModelAdapter, given: Mapping[str, Config]) -> list[SmallEntry]:
    """Every entry of the catalog made small, those that are then equal once. `given` has small
    configs by id, for entries that are not made small well. Raises AssertionError for an id that is
    not in the catalog.
    """
    configs = {entry.id: entry.config for entry in adapter.catalog()}
    if foreign := sorted(given.keys() - configs.keys()):
        raise AssertionError(
            f"small_configs: expected ids of the catalog, got {foreign[0]!r}; it has "
            f"{', '.join(configs) or 'none'}"
        )
    alike: dict[str, list[str]] = {}
    small: dict[str, dict[str, Any]] = {}
    for model_id, config in configs.items():
        made = dict(given[model_id]) if model_id in given else make_small(config)
        words = {key: value for key, value in made.items() if key not in _NOT_COMPUTED}
        told = json.dumps(words, sort_keys=True)
        small.setdefault(told, made)
        alike.setdefault(told, []).append(model_id)
    return [SmallEntry(tuple(ids), small[told]) for told, ids in alike.items()]
