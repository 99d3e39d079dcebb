"""The models of a catalog, made small: what is run of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollm_conformance.small import FEW_LAYERS, LAYERS, make_small
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
    """Every entry of the catalog made small, those that are then equal once, and the first of each
    model type with many layers. `given` has small configs by id, for entries that are not made
    small well. Raises AssertionError for an id that is not in the catalog.
    """
    configs = {entry.id: entry.config for entry in adapter.catalog()}
    if foreign := sorted(given.keys() - configs.keys()):
        raise AssertionError(
            f"small_configs: expected ids of the catalog, got {foreign[0]!r}; it has "
            f"{', '.join(configs) or 'none'}"
        )
    alike: dict[str, list[str]] = {}
    for model_id, config in configs.items():
        made = given.get(model_id) or make_small(config, FEW_LAYERS)
        words = {key: value for key, value in made.items() if key not in _NOT_COMPUTED}
        alike.setdefault(json.dumps(words, sort_keys=True), []).append(model_id)
    found, known = [], set()
    for ids in alike.values():
        config = configs[ids[0]]
        layers = FEW_LAYERS if config.get("model_type") in known else LAYERS
        known.add(config.get("model_type"))
        found.append(SmallEntry(tuple(ids), dict(given.get(ids[0]) or make_small(config, layers))))
    return found
