"""The check of configs that leave keys out, as published ones do and saved ones never."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedModel

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.alike import same_model
from ollm_conformance.checks import check
from ollm_conformance.kinds import same_kinds
from ollm_conformance.layer_cut import is_size
from ollm_conformance.models import meta_model, text_view
from ollm_conformance.naming import names_of
from ollm_conformance.small import FEW_LAYERS, HEADS, HIDDEN, make_small
from ollm_conformance.subject import Subject
from ollm_conformance.unstated import Shortened, first_difference, left_out, shortened, taken_for
from ollm_conformance.without_data import filled_layers, same_full_size
from ollm_core import Config, OllmError
from ollm_core.testing import read_config

_MOST_NUMBERS = 2_000_000
"""Parameters of a model that is still run."""


class Unstated(AdapterSuite):
    """Each key of a config.json left out in turn."""

    @check(
        "configs.unstated",
        "A config.json that leaves a key out is the model that transformers takes it for, bit for "
        "bit; only one without a size may be refused.",
        look="`defaults` of the adapter, layer_types(), text_config(): what transformers' config "
        "class assumes for the key that the message names",
    )
    def test_unstated(self, subject: Subject) -> None:
        saved, written = read_config(subject.tiny()), subject.config
        models: dict[str, _Changed] = {}
        for config in (saved, written):
            for changed in _changed_models(subject, config):
                models.setdefault(changed.words, changed)
        # Other sizes than the tiny ones, some of which may be those that are assumed.
        types = {entry.config.get("model_type"): entry for entry in subject.adapter.catalog()}
        others = [
            subject.small_configs.get(entry.id) or make_small(entry.config, FEW_LAYERS)
            for entry in types.values()
        ]
        for other in (_more_heads(written), *others):
            for _ in _changed_models(subject, other):
                pass  # what is declared of them is compared, they are not run
        few = [one for one in models.values() if one.num_parameters < _MOST_NUMBERS]
        reshaped = [one for one in few if one.reshaped]
        for changed in reshaped:
            if _can_run(changed.config):
                same_model(subject, changed.config, _without(changed.key), steps=1)
        for config in (saved, written):
            keys = [one.key for one in few if not one.reshaped and one.whole == config]
            _run_together(subject, config, [key for key in keys if "." not in key])
            _run_together(subject, config, [key for key in keys if "." in key])


@dataclass(frozen=True, slots=True)
class _Changed:
    """A model that is another one because a config leaves a key out."""

    key: str
    config: dict[str, Any]
    whole: Config
    """The config with the key."""
    words: str
    """The model as transformers' config class tells it: the same for the same one."""
    reshaped: bool
    """Whether it has other parameters than that of the whole config, or other shapes of them."""
    num_parameters: int


def _changed_models(subject: Subject, config: Config) -> Iterator[_Changed]:
    """The models that `config` is of without one key each, after what is declared of each was found
    to be true. Raises AssertionError where it is not.
    """
    adapter, whole, plain = subject.adapter, taken_for(config), meta_model(config)
    names, shapes = sorted(names_of(config, plain).forms), _shapes(plain)
    declared = _declared(subject, config, names)
    for one in shortened(config):
        what, taken = _without(one.key), taken_for(one.config)
        try:
            text = adapter.text_config(one.config)
            adapter.layout(text)
        except Exception as error:
            may_refuse = one.is_size or taken is None or not _can_run(one.config)
            if may_refuse and isinstance(error, OllmError):
                continue
            raise AssertionError(
                f"{what}: expected the model that transformers takes it for, got "
                f"{type(error).__name__}: {error}"
            ) from error
        if taken is None:
            continue
        difference = first_difference(taken, taken_for(text) or {})
        assert not difference, f"{what}: text_config(): {difference}"
        if taken == whole:
            said = _declared(subject, one.config, names)
            assert said == declared, (
                f"{what}: expected what the adapter declares with it, as transformers takes both "
                f"for one model, got {said if isinstance(said, str) else 'something else'}"
            )
            continue
        model = _model(one.config)
        if model is None:
            continue
        reshaped = _shapes(model) != shapes
        try:
            is_model = _same_declarations(subject, one, what, model, reshaped=reshaped)
        except Exception as error:
            if not _can_run(one.config):
                continue
            if isinstance(error, AssertionError):
                raise
            raise AssertionError(
                f"{what}: expected declarations, got {type(error).__name__}: {error}"
            ) from error
        if is_model:
            num_parameters = sum(p.numel() for p in model.parameters())
            yield _Changed(one.key, one.config, config, _words(taken), reshaped, num_parameters)


def _run_together(subject: Subject, config: Config, keys: list[str]) -> None:
    """Run `config` without any of `keys`, and without each alone where that is not right, or is
    nothing that transformers can run. The parameters are those of the whole config.
    """
    without = functools.reduce(left_out, keys, config)
    together: AssertionError | None = None
    if len(keys) > 1 and _model(without) is not None and _can_run(without):
        try:
            same_model(subject, without, _without(", ".join(keys)), steps=1)
        except AssertionError as error:
            together = error
        else:
            return
    for key in keys:
        alone = left_out(config, key)
        if _can_run(alone):
            same_model(subject, alone, _without(key), steps=1)
    if together:
        raise together


def _without(keys: str) -> str:
    return f"config.json without {keys}"


def _same_declarations(
    subject: Subject, one: Shortened, what: str, model: PreTrainedModel, *, reshaped: bool
) -> bool:
    """What is declared without the key must be of the model that transformers then makes; False if
    nothing is, for want of a size.
    """
    adapter, text = subject.adapter, subject.adapter.text_config(one.config)
    try:
        layout, caches = adapter.layout(text), adapter.caches(text)
        plan = adapter.weights(text, sorted(names_of(one.config, model).forms))
    except OllmError as error:
        if one.is_size:
            return False
        raise AssertionError(f"{what}: expected a plan, got: {error}") from error
    same_kinds(caches, DynamicCache(config=model.config), what)
    if reshaped:
        same_full_size(caches, text_view(one.config), what)
    expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(expected ^ (plan.parameters.keys() | plan.experts.keys())):
        state = "got none" if name in expected else "which transformers does not have, got one"
        raise AssertionError(f"{what}: expected a source for each parameter; {name}: {state}")
    head, table = f"{layout.head}.weight", f"{layout.embedding}.weight"
    tied = model.get_parameter(head) is model.get_parameter(table)
    assert (plan.parameters[head] == plan.parameters[table]) is tied, (
        f"{what}: expected {'one tensor' if tied else 'two tensors'} for embedding and head, got "
        f"{plan.parameters[table].tensors} and {plan.parameters[head].tensors}"
    )
    return True


def _more_heads(config: Config) -> dict[str, Any]:
    """`config` with twice the query heads; where their dimension follows from the hidden size, with
    twice that.
    """
    if isinstance(inner := config.get("text_config"), Mapping):
        return {**config, "text_config": _more_heads(inner)}
    keys = (*HEADS, *(HIDDEN if config.get("head_dim") is None else ()))
    return {
        key: 2 * value if key in keys and is_size(value) else value for key, value in config.items()
    }


def _declared(subject: Subject, config: Config, names: list[str]) -> Any:
    """All that an adapter says of a checkpoint with `names`; the error where it says nothing."""
    adapter = subject.adapter
    try:
        text = adapter.text_config(config)
        plan = adapter.weights(text, names)
    except Exception as error:  # noqa: BLE001 - no plan, whatever it is
        return f"{type(error).__name__}: {error}"
    sources = {**plan.parameters, **plan.experts}
    return adapter.layout(text), tuple(adapter.caches(text)), sources, plan.ignored


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _model(config: Config) -> PreTrainedModel | None:
    """The model without data; None where transformers makes none."""
    try:
        return meta_model(config)
    except Exception:  # noqa: BLE001 - whatever it says of such a config
        return None


def _can_run(config: Config) -> bool:
    """Whether transformers can run the model, whose sizes may not fit together."""
    try:
        filled_layers(text_view(config))
    except Exception:  # noqa: BLE001 - whatever it says of such a model
        return False
    return True


def _words(config: Config | None) -> str:
    return json.dumps(config, sort_keys=True, default=str)
