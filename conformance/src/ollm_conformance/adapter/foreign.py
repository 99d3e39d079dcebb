"""Checks that no tensor which matters is dropped in silence: beside a parameter, or by a flag."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import refused
from ollm_conformance.models import model_config
from ollm_conformance.naming import Names, kept_names, one_of_each
from ollm_conformance.subject import Subject
from ollm_core import (
    CheckpointError,
    Config,
    ConfigError,
    ModelAdapter,
    OllmError,
    UnsupportedError,
)

_LOOK = "ignores() (weights() if you wrote your own): name only what is known to be superfluous"
_BESIDE = (
    "bias", "weight_scale", "weight_scale_inv", "input_scale", "g_idx", "qweight", "qzeros",
    "scales", "lora_A.weight", "weight_blocks", "weight.absmax",
)  # fmt: skip
"""What quantised, fused and tuned checkpoints have beside NAME.weight."""
_BESIDE_STACKS = ("_bias", "_blocks", "_scales")
"""What they have beside a parameter of another name."""
_NORMS = ("q_norm.weight", "k_norm.weight", "sinks")
_LAYER_NORMS = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight",
)  # fmt: skip
_TOP = ("model.strange.weight", "model.embed_positions.weight", "score.weight")


class Foreign(AdapterSuite):
    """What a checkpoint has and the model has not is refused by name."""

    @check(
        "weights.swallowed",
        "A bias, scale, norm, expert or layer that the model does not have is refused by name, "
        "wherever it appears in a checkpoint.",
        look=_LOOK,
    )
    def test_swallowed(self, subject: Subject) -> None:
        adapter, config = subject.adapter, subject.adapter.text_config(subject.config)
        names, layout = kept_names(subject, config), adapter.layout(config)
        for foreign in _foreign(names, f"{layout.layers}.", layout.num_layers):
            _is_refused(adapter, config, names.forms, foreign, "tiny_config()")

    @check(
        "weights.superfluous",
        "What transformers passes over in a checkpoint of the family, as layers that "
        "predict further tokens, is passed over, and changes nothing of what is read.",
        look=_LOOK,
    )
    def test_superfluous(self, subject: Subject) -> None:
        adapter, config = subject.adapter, subject.adapter.text_config(subject.config)
        names, layers = kept_names(subject, config), adapter.layout(config).layers
        plain = adapter.weights(config, sorted(names.forms))
        for pattern in names.ignored:
            for tensor in _matching(pattern, names, layers):
                case = f"tiny_config(), with tensor {tensor}, which transformers ignores"
                try:
                    plan = adapter.weights(config, [*sorted(names.forms), tensor])
                except OllmError as error:
                    raise AssertionError(f"{case}: expected it ignored, got: {error}") from error
                expected, got = (
                    [name for source in one.sources() for name in source.tensors]
                    for one in (plain, plan)
                )
                assert got == expected, (
                    f"{case}: expected {len(expected)} tensors read as without it, got {len(got)}, "
                    f"{'that one too' if tensor in got else 'in another order'}"
                )

    @check(
        "weights.flags",
        "With any flag of the config turned over, the config is refused, or exactly the tensors of "
        "the model that transformers then builds are taken: one more or one less is refused.",
        look="layer_parameters() and ignores() (weights() if you wrote your own): tensors that "
        "only some configs have, such as biases; layout() may refuse a flag by UnsupportedError",
    )
    def test_flags(self, subject: Subject) -> None:
        adapter, stated = subject.adapter, subject.adapter.text_config(subject.config)
        plain = kept_names(subject, stated)
        for what, config in _flipped(stated):
            try:
                names = kept_names(subject, config)
            except Exception:  # noqa: BLE001 - transformers has no such model
                continue
            try:
                layout = adapter.layout(config)
                adapter.weights(config, sorted(names.forms))
            except (UnsupportedError, ConfigError):
                continue  # refused whole, which is no silence
            except CheckpointError as error:
                raise AssertionError(
                    f"{what}: expected the tensors of transformers' model to be taken, got: {error}"
                ) from error
            head = f"{layout.head}.weight"
            tied = {head} if head in names.parameters and head not in names.forms else set()
            for foreign in one_of_each(plain.forms.keys() - names.forms.keys() - tied):
                _is_refused(adapter, config, names.forms, foreign, what)
            for missing in one_of_each(names.forms.keys() - plain.forms.keys()):
                case = f"{what}, without tensor {missing}"
                with refused(CheckpointError, case) as refusal:
                    adapter.weights(config, sorted(names.forms.keys() - {missing}))
                refusal.says(missing)


def _is_refused(
    adapter: ModelAdapter, config: Config, stored: Iterable[str], foreign: str, what: str
) -> None:
    with refused(CheckpointError, f"{what}, with tensor {foreign}") as refusal:
        adapter.weights(config, [*stored, foreign])
    refusal.says(foreign)


def _matching(pattern: str, names: Names, layers: str) -> list[str]:
    """Names that a pattern of transformers matches, made of what a model has: a layer, a norm and
    a projection below the words that the pattern begins with. None for a pattern with a number,
    which means a layer of a published model.
    """
    begin = re.match(r"[\w.\\]*", pattern.removeprefix("^"))
    root = begin[0].replace("\\", "").rstrip(".") if begin else ""
    if not root or re.search(r"\d", root):
        return []
    first = f"{layers}.0."
    rests = [name.removeprefix(first) for name in sorted(names.forms) if name.startswith(first)]
    leaves = ["fc.weight", "norm.weight", "proj.bias", *(f"layers.0.{rest}" for rest in rests)]
    found = [f"{root}.{leaf}" for leaf in leaves]
    return [name for name in found if re.search(pattern, name) and name not in names.forms]


def _foreign(names: Names, layers: str, num_layers: int) -> Iterator[str]:
    """Names that the checkpoint does not have and that transformers would not ignore, each once.
    `layers` is the path of all layers, with a dot.
    """
    found = dict.fromkeys(_TOP)
    for name in _first_and_last(names.forms):
        found |= dict.fromkeys(_beside(name, layers, num_layers))
    return (name for name in found if name not in names.forms and not names.ignores(name))


def _beside(name: str, layers: str, num_layers: int) -> Iterator[str]:
    """What might be beside tensor `name`, in its layer or in one more."""
    stem = name.removesuffix(".weight")
    if stem != name:
        yield from (f"{stem}.{leaf}" for leaf in _BESIDE)
    else:
        yield from (f"{name}{leaf}" for leaf in _BESIDE_STACKS)
    parent, _, leaf = stem.rpartition(".")
    if re.fullmatch(r"q\w*_proj|Wqkv|query_key_value", leaf):
        yield from (f"{parent}.{norm}" for norm in _NORMS)
    if leaf == "down_proj" or leaf.endswith("router"):
        yield f"{parent}.shared_expert.{leaf}.weight"
        yield f"{parent}.shared_experts.{leaf}.weight"
    if more := re.match(r"(.*\.experts\.)(\d+)(\..*)", name):  # the next after the last expert
        yield f"{more[1]}{int(more[2]) + 1}{more[3]}"
    if not name.startswith(layers):
        return
    number, _, rest = name.removeprefix(layers).partition(".")
    if number == "0":
        yield f"{layers}{num_layers}.{rest}"
    yield from (f"{layers}{number}.{norm}" for norm in _LAYER_NORMS)


def _first_and_last(names: Iterable[str]) -> list[str]:
    """Of each kind of name, numbers apart, the first and the last."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=_with_numbers):
        kinds.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    return [name for kind in kinds.values() for name in dict.fromkeys((kind[0], kind[-1]))]


def _with_numbers(name: str) -> list[Any]:
    """Sorts layer 10 behind layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _flipped(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each flag of a config turned over, with what was done: those it states, nested ones too, and
    those that its family's config class assumes.
    """
    whole = model_config(config)
    assumed = {k: v for k, v in whole.to_dict().items() if k not in PreTrainedConfig().to_dict()}
    stated = {**{k: v for k, v in assumed.items() if isinstance(v, bool)}, **config}
    for key, value in stated.items():
        if isinstance(value, bool):
            yield f"{key} = {not value}", {**config, key: not value}
        elif isinstance(value, Mapping):
            for inner, flag in value.items():
                if isinstance(flag, bool):
                    yield f"{key}.{inner} = {not flag}", {**config, key: {**value, inner: not flag}}
