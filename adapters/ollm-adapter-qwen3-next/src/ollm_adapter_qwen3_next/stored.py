"""How a checkpoint of Qwen3.5 names its tensors. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ollm_core import Config, ConfigError, ParameterSource, WeightPlan

STACKED = "experts are stacked"
"""Key of a config, added by `as_stored`: whether one tensor holds all experts of a layer. Absent
where the checkpoint is not there, which makes no difference to its size.
"""

_INNER, _VISION = "model.language_model.", "model.visual."


def text_config(config: Config) -> Config:
    """The part of a config.json that is about language, with what the whole says of the head."""
    inner = config.get("text_config")
    if inner is None:
        return config
    if not isinstance(inner, Mapping):
        raise ConfigError(f"config.json: text_config must be an object, got {ascii(inner)[:80]}")
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**tied, **inner}


def as_stored(
    weights: Callable[[Config, Iterable[str]], WeightPlan],
    config: Config,
    tensor_names: Iterable[str],
) -> WeightPlan:
    """What `weights` plans for a language model alone, over the tensors of one that also sees."""
    stored = {_as_of_text(name): name for name in tensor_names}
    seen = {name for name in stored if name.startswith(_VISION)}
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in stored)
    plan = weights({**config, STACKED: stacked}, stored.keys() - seen)

    def renamed(source: ParameterSource) -> ParameterSource:
        return replace(source, tensors=tuple(stored[name] for name in source.tensors))

    return WeightPlan(
        {name: renamed(source) for name, source in plan.parameters.items()},
        frozenset(stored[name] for name in plan.ignored | seen),
        {name: tuple(map(renamed, slices)) for name, slices in plan.experts.items()},
    )


def _as_of_text(name: str) -> str:
    return name.replace(_INNER, "model.", 1) if name.startswith(_INNER) else name
