"""Checks of configs that differ from the tiny one in what decides the kinds of layers, or in a
null. Nothing of them is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import DynamicCache

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.kinds import same_kinds
from ollm_conformance.models import model_config
from ollm_conformance.naming import kept_names
from ollm_conformance.subject import Subject
from ollm_conformance.unstated import first_difference, left_out, taken_for
from ollm_conformance.uses import used_once
from ollm_core import OllmError, UnsupportedError

_WINDOWS = (7, 50_000, None)
_DENSE: tuple[dict[str, Any], ...] = (
    {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"first_k_dense_replace": 1},
)  # fmt: skip


class Varied(AdapterSuite):
    """Other values of keys that most authors try one of."""

    @check(
        "configs.windows",
        "Whatever windows, kinds of layers and flags for them a config.json states, each layer's "
        "cache is of the kind and has the window that transformers gives it.",
        look="caches() and layer_types(): sliding_window, use_sliding_window, max_window_layers, "
        "layer_types; what is remembered of another config",
    )
    def test_windows(self, subject: Subject) -> None:
        varied = list(_other_windows(subject.config))
        if not varied:
            does_not_apply("no key of its config decides the kinds of layers")
        for what, config in varied:
            try:
                expected = DynamicCache(config=model_config(config))
            except Exception:  # noqa: BLE001 - transformers has no such model
                continue
            try:
                text = subject.adapter.text_config(config)
                subject.adapter.layout(text)
                declared = subject.adapter.caches(text)
            except OllmError:
                continue
            same_kinds(declared, expected, what)

    @check(
        "configs.dense-layers",
        "Whichever layers a config.json says to have routed experts, the tensors of transformers' "
        "model make its parameters.",
        look="layer_parameters() and experts(): decoder_sparse_step, mlp_only_layers and the like",
    )
    def test_dense_layers(self, subject: Subject) -> None:
        known = model_config(subject.config).get_text_config()
        varied = [changes for changes in _DENSE if all(hasattr(known, key) for key in changes)]
        if not varied:
            does_not_apply("no key of its config says which layers have experts")
        for changes in varied:
            config = {**subject.config, **changes}
            names, text = kept_names(subject, config), subject.adapter.text_config(config)
            try:
                subject.adapter.layout(text)
            except UnsupportedError:
                continue
            what = f"tiny_config() with {changes}"
            used_once(subject.adapter, text, set(names.forms), names.parameters, what)

    @check(
        "configs.nulls",
        "A null in config.json says what transformers takes it to say.",
        look="text_config(): a key that is null is not one that is left out",
    )
    def test_nulls(self, subject: Subject) -> None:
        for key in subject.config:
            config = {**subject.config, key: None}
            taken = taken_for(config)
            if taken is None:
                continue
            try:
                text = subject.adapter.text_config(config)
            except OllmError:
                continue
            difference = first_difference(taken, taken_for(text) or {})
            assert not difference, f"tiny_config() with {key} = null: text_config(): {difference}"


def _other_windows(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Configs that differ from `config` in what may decide the kind or the window of a layer, with
    what was changed.
    """
    known = model_config(config).get_text_config()
    listed = config.get("layer_types", getattr(known, "layer_types", None))
    if isinstance(listed, (list, tuple)) and len(set(listed)) > 1:
        yield _changed(config, layer_types=[*listed[1:], listed[0]])
        yield _changed(config, layer_types=list(listed)[::-1])
    if getattr(known, "sliding_window", None) is None or "sliding_window" not in config:
        return
    unlisted = left_out(config, "layer_types")
    flags = [{"use_sliding_window": flag} for flag in (True, False)]
    firsts = [{"max_window_layers": first} for first in (0, 1)]
    for window in _WINDOWS:
        if window is not None and listed is not None:
            yield _changed(config, sliding_window=window)
        for flag in flags if hasattr(known, "use_sliding_window") else [{}]:
            for first in firsts if hasattr(known, "max_window_layers") else [{}]:
                yield _changed(unlisted, sliding_window=window, **flag, **first)
    if hasattr(known, "max_window_layers"):  # where it is left out, only deep models tell
        deep = left_out(unlisted, "max_window_layers")
        yield _changed(deep, num_hidden_layers=60, sliding_window=7, use_sliding_window=True)


def _changed(config: dict[str, Any], **changes: Any) -> tuple[str, dict[str, Any]]:
    listed = "" if "layer_types" in {**config, **changes} else ", layer_types not listed"
    return f"tiny_config() with {changes}{listed}", {**config, **changes}
