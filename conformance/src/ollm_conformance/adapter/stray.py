"""Checks of keys of config.json that belong to another config: of other families, or of the whole
model of which a text's is a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.models import model_config
from ollm_conformance.naming import Names, kept_names, names_of
from ollm_conformance.subject import Subject
from ollm_core import Config, DecoderAdapter, ModelAdapter, OllmError

_STRAY: dict[str, Any] = {
    "attention_chunk_size": 64,
    "decoder_sparse_step": 2,
    "first_k_dense_replace": 1,
    "max_window_layers": 1,
    "mlp_only_layers": [0],
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "qkv_bias": True,
    "sliding_window": 64,
    "sliding_window_pattern": 2,
    "use_bias": True,
    "use_sliding_window": True,
}
"""Keys that some families know, with values that matter there."""


class Stray(AdapterSuite):
    """What a config.json says beside what its family's config class knows."""

    @check(
        "configs.stray-keys",
        "A key that the family's config class does not know, as of windows or experts in a config "
        "that was made from another family's, alone or with others, changes nothing of what the "
        "adapter declares, or is refused.",
        look="layer_types(), layout(), caches(): go by keys that transformers' class has",
    )
    def test_stray_keys(self, subject: Subject) -> None:
        config = subject.config
        known = known_keys(config)
        stray = {key: value for key, value in _STRAY.items() if key not in known}
        if not _has_own_types(subject.adapter):
            stray = {key: value for key, value in stray.items() if "window" not in key}
        expected = _declared(subject, config)
        for added in (*({key: value} for key, value in stray.items()), stray):
            for one in (config, {k: v for k, v in config.items() if k != "layer_types"}):
                wanted = expected if one is config else _declared(subject, one)
                got = _declared(subject, {**one, **added})
                assert got == wanted or isinstance(got, str), (
                    f"tiny_config() with {added}, which transformers' config class does not know: "
                    f"expected what is declared without it, got another {_which(wanted, got)}"
                )

    @check(
        "configs.whole",
        "Where the text's config.json is a part of a whole model's, which also sees, the whole's "
        "checkpoint is taken: its text's tensors are read, all others ignored, and its head is "
        "tied if the whole's config says so.",
        look="text_config(): keys beside text_config; weights(), ignores(): names in the whole",
    )
    def test_whole(self, subject: Subject) -> None:
        adapter, ran = subject.adapter, False
        head = f"{adapter.layout(adapter.text_config(subject.config)).head}.weight"
        for whole, model in _wholes(subject):
            ran = True
            names, text = names_of(whole, model), adapter.text_config(whole)
            tied = whole["tie_word_embeddings"]
            case = (
                f"model_type {whole['model_type']}, tie_word_embeddings = {tied} beside text_config"
            )
            try:
                plan = adapter.weights(text, sorted(names.forms))
            except OllmError as error:
                raise AssertionError(f"{case}: expected it taken, got: {error}") from error
            alone = _is_alone(names)
            source = plan.parameters[head].tensors
            assert ("lm_head" in source[0]) == alone, (
                f"{case}: expected {'a head of its own' if alone else 'the embedding'} for {head}, "
                f"got tensor {source[0]}"
            )
        if not ran:
            does_not_apply("no model type of the adapter has its text's config inside")


def _has_own_types(adapter: ModelAdapter) -> bool:
    """Whether it says itself which layers have windows. The default believes any config.json that
    has some, as transformers' caches do.
    """
    cls = type(adapter)
    if not issubclass(cls, DecoderAdapter):
        return True
    own = cls.__mro__[: cls.__mro__.index(DecoderAdapter)]
    return any("layer_types" in vars(one) for one in own)


def known_keys(config: Config) -> set[str]:
    """Keys that the config class of a family has, whatever is stated, by any name."""
    cls = type(model_config(config).get_text_config())
    return {*cls().to_dict(), *cls.attribute_map, *cls.attribute_map.values()}


def _declared(subject: Subject, config: Config) -> tuple[Any, ...] | str:
    """Layout, caches and parameters by name, or the refusal."""
    adapter = subject.adapter
    names = sorted(kept_names(subject, subject.config).forms)
    try:
        text = adapter.text_config(config)
        plan = adapter.weights(text, names)
        parameters = [(name, one.tensors) for name, one in sorted(plan.parameters.items())]
        return adapter.layout(text), list(adapter.caches(text)), parameters
    except OllmError as error:
        return str(error)


def _which(wanted: Any, got: Any) -> str:
    if isinstance(wanted, str):
        return "answer where it is refused without"
    places = [one != other for one, other in zip(wanted, got, strict=True)]
    return ("layout()", "caches()", "weights()")[places.index(True)]


def _wholes(subject: Subject) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """Configs of whole models around the tiny text's, and their models without data."""
    tiny = {k: v for k, v in subject.config.items() if k != "tie_word_embeddings"}
    for model_type in subject.adapter.model_types:
        if model_type not in CONFIG_MAPPING:
            continue
        cls = CONFIG_MAPPING[model_type]
        inner = getattr(cls, "sub_configs", {}).get("text_config")
        if inner is None or inner.model_type != subject.config["model_type"]:
            continue
        for tied in (True, False):
            whole = {"model_type": model_type, "text_config": tiny, "tie_word_embeddings": tied}
            try:
                with torch.device("meta"):
                    model = AutoModelForImageTextToText.from_config(
                        model_config(whole), trust_remote_code=False
                    )
            except ValueError:  # it does not see
                continue
            yield whole, model


def _is_alone(names: Names) -> bool:
    """Whether a checkpoint has a head beside its embedding."""
    return any(name.endswith("lm_head.weight") for name in names.forms)
