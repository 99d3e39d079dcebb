"""Checks of the configs that are published, beside the one that an author made up for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.alike import same_model
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import refused
from ollm_conformance.features import features
from ollm_conformance.kinds import same_kinds
from ollm_conformance.models import meta_model, model_config, random_model, text_view
from ollm_conformance.small_catalog import SmallEntry, small_catalog
from ollm_conformance.subject import Subject
from ollm_conformance.without_data import same_full_size
from ollm_core import Config, DecoderAdapter, OllmError

_MOST_BYTES = 64_000_000
_ROPES: Mapping[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
    },
}
_REFUSED: Mapping[str, dict[str, Any]] = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.0],
    },
}
"""Whose frequencies depend on the longest position so far: a prompt in chunks would differ."""
"""Parameters with which each type changes what is computed, in a tiny model too."""
_USUAL = ("default", "linear", "yarn")
"""Types that fine-tunes of any family may have."""


class Configs(AdapterSuite):
    """Every model of the catalog, made small and as it is; every rotary embedding."""

    @check(
        "configs.small",
        "Every model of the catalog, made small with its ratios and flags kept, has the caches, "
        "the parameters and the logits of transformers, bit for bit.",
        look="what goes by the config: layer_parameters(), source(), caches(), layer_types(), "
        "text_config(); the message names the model of the catalog",
    )
    def test_small(self, subject: Subject) -> None:
        for small in _small(subject):
            num_bytes = 4 * sum(p.numel() for p in meta_model(small.config).parameters())
            assert num_bytes < _MOST_BYTES, (
                f"{small.name}: expected less than 64 MB in float32, got {num_bytes} bytes; "
                "give a small config of it in `small_configs` of the test class"
            )
            same_model(subject, small.config, small.name)

    @check(
        "configs.active",
        "What is active in the config of a catalog's model, as a flag, a bias, a multiplier or a "
        "ratio of heads, is active in a config that is run.",
        look="tiny_config() of the adapter, small_configs of the test class",
    )
    def test_active(self, subject: Subject) -> None:
        run = [subject.config, *(small.config for small in _small(subject))]
        seen = set[str]().union(
            *(features(text_view(subject.adapter.text_config(config))) for config in run)
        )
        for entry in subject.adapter.catalog():
            unseen = sorted(features(text_view(subject.adapter.text_config(entry.config))) - seen)
            assert not unseen, (
                f"{entry.id}: expected a config that is run with all that is active in it, got "
                f"none with {'; '.join(unseen[:3])} ({len(unseen)} in all)"
            )

    @check(
        "configs.caches",
        "In every model of the catalog, as large as it is, each layer's declared cache has the "
        "kind, the window and the shape of the one in transformers.",
        look="caches() and layer_types(): kind, num_kv_heads, head_dim, window and states",
    )
    def test_caches(self, subject: Subject) -> None:
        entries = subject.adapter.catalog()
        if not entries:
            does_not_apply("the catalog is empty")
        for entry in entries:
            config = subject.adapter.text_config(entry.config)
            declared = subject.adapter.caches(config)
            same_kinds(declared, DynamicCache(config=model_config(entry.config)), entry.id)
            same_full_size(declared, text_view(config), entry.id)

    @check(
        "configs.rope-types",
        "With each rotary embedding that the adapter declares, logits are those of transformers, "
        "bit for bit; plain ones and those that are stretched for long texts are among them where "
        "transformers has them, and those that depend on the length of the prompt are refused.",
        look="`rope_types` of the adapter, and text_config(), which must keep their parameters",
    )
    def test_rope_types(self, subject: Subject) -> None:
        adapter = subject.adapter
        if not isinstance(adapter, DecoderAdapter):
            does_not_apply("the adapter declares no types of rotary embeddings")
        config: dict[str, Any] | None = None
        for rope_type in adapter.rope_types:
            assert rope_type in _ROPES, (
                f"rope_types: expected some of {', '.join(_ROPES)}, got {rope_type!r}"
            )
            config = with_rope(subject.config, rope_type)
            if config is not None:
                same_model(subject, config, f"tiny_config() with rope type {rope_type}", steps=1)
        if config is not None and isinstance(old := config.get("rope_scaling"), Mapping):
            old = {"type" if key == "rope_type" else key: value for key, value in old.items()}
            what = f"tiny_config() with rope_scaling {old}"
            same_model(subject, {**config, "rope_scaling": old}, what, steps=1)
        for rope_type in [one for one in _USUAL if one not in adapter.rope_types]:
            config = with_rope(subject.config, rope_type)
            assert config is None or not _runs(config), (
                f"rope_types: expected {rope_type!r} among them, which transformers runs for this "
                f"family, got {', '.join(adapter.rope_types)}"
            )
        for rope_type in _REFUSED.keys() - set(adapter.rope_types):
            config = with_rope(subject.config, rope_type)
            if config is not None:
                with refused(OllmError, f"layout() of tiny_config() with rope type {rope_type}"):
                    adapter.layout(adapter.text_config(config))


def _runs(config: Config) -> bool:
    """Whether transformers runs such a model."""
    try:
        with torch.no_grad():
            random_model(config)(torch.arange(5, 14)[None])
    except Exception:  # noqa: BLE001 - whatever transformers says of such a config
        return False
    return True


def with_rope(config: Config, rope_type: str) -> dict[str, Any] | None:
    """`config` with another type of rotary embedding, in the words of transformers 4, which are
    those of most config.json files; in the words of 5 where layers have several. None if it has
    that type already.
    """
    if isinstance(inner := config.get("text_config"), Mapping):
        changed = with_rope(inner, rope_type)
        return changed and {**config, "text_config": changed}
    known = getattr(model_config(config), "rope_parameters", None)
    if not known:
        return None
    several = all(isinstance(rope, Mapping) for rope in known.values())
    ropes = list(known.values()) if several else [known]
    if all(rope.get("rope_type", "default") == rope_type for rope in ropes):
        return None
    own = {"rope_type": rope_type, **{**_ROPES, **_REFUSED}[rope_type]}
    plain = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_parameters")}
    if several:
        return {**plain, "rope_parameters": {k: {**_base(r), **own} for k, r in known.items()}}
    base = _base(known)
    theta = base.pop("rope_theta")
    return {**plain, "rope_theta": theta, "rope_scaling": {**base, **own}}


def _base(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What every type has."""
    kept = ("mrope_interleaved", "mrope_section", "partial_rotary_factor", "rope_theta")
    return {key: rope[key] for key in kept if key in rope}


def _small(subject: Subject) -> list[SmallEntry]:
    found = small_catalog(subject.adapter, subject.small_configs)
    if not found:
        does_not_apply("the catalog is empty")
    return found


def _features(subject: Subject, config: Config) -> set[str]:
    return features(text_view(subject.adapter.text_config(config)))
