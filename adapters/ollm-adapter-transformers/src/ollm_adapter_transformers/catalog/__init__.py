"""The models that people ask for most, by id and by the names that users of Ollama type.

Data, in one JSON file a family: `base` is what the configs of its models share, and each of
`models` has

- `id`, `repo`, `license` and `aliases`, the first of which is shown;
- `config`, only where it is known for certain: what its config.json has beside or in place of
  `base`; then `source` says where it was copied from, `num_parameters` counts a tied head once, and
  `weight_bytes` are those of all tensors of the checkpoint, 0 where its form is not in the config.

A model without `config` can be pulled; `ollm plan` asks the hub for its config.json first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from ollm_core import CatalogEntry


def entries() -> tuple[CatalogEntry, ...]:
    """New objects at every call: what transformers does to a config stays with that caller."""
    return tuple(_entry(base, model) for base, model in read())


def read() -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """What the files say: the family's `base`, and one of its `models`, family by family."""
    folder = files(__package__)
    for path in sorted(folder.iterdir(), key=lambda one: one.name):
        if path.name.endswith(".json"):
            family = json.loads(path.read_text(encoding="utf-8"))
            for model in family["models"]:
                yield family["base"], model


def _entry(base: Mapping[str, Any], model: Mapping[str, Any]) -> CatalogEntry:
    own = model.get("config")
    return CatalogEntry(
        model["id"],
        model["repo"],
        model.get("num_parameters", 0),
        model.get("weight_bytes", 0),
        {} if own is None else json.loads(json.dumps({**base, **own})),
        license=model["license"],
        aliases=tuple(model["aliases"]),
    )
