"""Checks of what the tiny config is not: model types that are claimed beside its own, and depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.adapter.stray import known_keys
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.kinds import same_kinds
from ollm_conformance.models import meta_model
from ollm_conformance.naming import names_of
from ollm_conformance.subject import Subject
from ollm_core import Config, OllmError
from ollm_core.testing import check_model

_MANY = 22
_WINDOWS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")


class Claimed(AdapterSuite):
    """Every other check opens the tiny config, of one model type and a few layers."""

    @check(
        "declaration.claimed",
        "Of each other model type that is claimed, the layers, their windows and their parameters "
        "are those of transformers' model of that type, also where config.json does not state "
        "them, or it is refused.",
        look="`model_types`: what a type's config class assumes, as a window, is not another's",
    )
    def test_claimed(self, subject: Subject) -> None:
        told = [_same_layers(subject, *one) for one in _of_other_types(subject)]
        if not any(told):
            does_not_apply("it claims one model type")

    @check(
        "configs.many-layers",
        "The tiny config with twenty-two layers has those of transformers' model of it, their "
        "windows and their parameters.",
        look="layer_parameters(), layer_types(): numbers of layers have two digits",
    )
    def test_many_layers(self, subject: Subject) -> None:
        tiny = subject.config
        few = tiny["num_hidden_layers"]
        lists = {
            key: [value[i % few] for i in range(_MANY)]
            for key, value in tiny.items()
            if isinstance(value, list) and len(value) == few and key.startswith("layer")
        }
        config = {**tiny, **lists, "num_hidden_layers": _MANY}
        if not _same_layers(subject, f"tiny_config() with {_MANY} layers", config, must=True):
            does_not_apply("transformers has no such model")


def _same_layers(subject: Subject, case: str, config: Config, *, must: bool = False) -> bool:
    """Raises AssertionError unless layers and parameters that are declared are those of the model
    that transformers makes, or, unless they `must` be taken, are refused. False if it makes none.
    """
    adapter = subject.adapter
    try:
        model = meta_model(config)
        names = names_of(config, model)
    except Exception:  # noqa: BLE001 - transformers has no such model
        return False
    try:
        text = adapter.text_config(config)
        layout, kinds = adapter.layout(text), adapter.caches(text)
        plan = adapter.weights(text, sorted(names.forms))
        check_model(text, layout)
    except OllmError as error:
        if must:
            raise AssertionError(f"{case}: expected it taken, got: {error}") from error
        return True
    same_kinds(kinds, DynamicCache(config=model.config), case)
    expected = {name for name in names.parameters if ".experts." not in name}
    got = {name for name in plan.parameters if ".experts." not in name}
    wrong = sorted(expected ^ got)
    assert not wrong, f"{case}: expected the parameters of its model, got other {wrong[:3]}"
    return True


def _of_other_types(subject: Subject) -> Iterator[tuple[str, Config]]:
    """The tiny config under another type, with the keys that its class has: as it is, and without
    those of windows. A whole model's type, whose text's config is inside, is for configs.whole.
    """
    tiny: dict[str, Any] = {k: v for k, v in subject.config.items() if k != "architectures"}
    for model_type in subject.adapter.model_types:
        if model_type == tiny["model_type"] or model_type not in CONFIG_MAPPING:
            continue
        if "text_config" in getattr(CONFIG_MAPPING[model_type], "sub_configs", {}):
            continue
        known = known_keys({"model_type": model_type})
        plain = {key: value for key, value in tiny.items() if key in known}
        bare = {key: value for key, value in plain.items() if key not in _WINDOWS}
        yield f"tiny_config() as {model_type}", {**plain, "model_type": model_type}
        yield f"the same, windows unstated, as {model_type}", {**bare, "model_type": model_type}
