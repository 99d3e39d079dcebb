"""Checks of what an adapter says about itself, before any weight is read."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ollm_conformance import probe
from ollm_conformance.adapter.asks import ASKS
from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check, does_not_apply
from ollm_conformance.compare import refused
from ollm_conformance.models import meta_model, model_config
from ollm_conformance.naming import kept_names
from ollm_conformance.subject import PROMPT, Subject
from ollm_conformance.untouched import spoiled, untouched
from ollm_core import Config, ModelAdapter, OllmError, UnsupportedError
from ollm_core.testing import (
    Registry,
    check_capability,
    check_halves,
    check_model,
    check_paths,
    told,
)

_BAD_VALUES: tuple[Any, ...] = (
    None, -1, 0, 1.5, 10**30, "x", [], {}, True, [1, 2], {"a": []},
)  # fmt: skip


class Declaration(AdapterSuite):
    """Names, capabilities, catalog, and configs that lie."""

    @check(
        "declaration.imports-clean",
        "Importing the adapter prints nothing, loads no torch, and leaves transformers as it was.",
        look="the adapter's module: import torch in functions, use transformers' registries",
    )
    def test_imports_clean(self, subject: Subject) -> None:
        cls = type(subject.given_adapter)
        if "<locals>" in cls.__qualname__:
            raise AssertionError(f"expected an adapter class of a module, got {cls.__qualname__}")
        place = [cls.__module__, cls.__qualname__, json.dumps(sys.path)]
        ran = subprocess.run(
            [sys.executable, probe.__file__, *place], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, (ran.stderr.strip() or ran.stdout).splitlines()[-1]
        with untouched(type(meta_model(subject.config)).__module__):
            probe.read_declarations(subject.given_adapter)

    @check(
        "declaration.names",
        "The adapter has a proper name and claims model types that transformers knows.",
        look="`name`, `model_types` and `adapter_api` of the adapter",
    )
    def test_names(self, subject: Subject) -> None:
        adapter = subject.given_adapter
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", adapter.name), (
            f"name: expected small letters, digits and hyphens, got {adapter.name!r}"
        )
        assert adapter.model_types or adapter.claims_rest, (
            "model_types: expected at least one, got none"
        )
        tiny_type = subject.config.get("model_type")
        assert tiny_type in adapter.model_types or adapter.claims_rest, (
            f"tiny_config(): expected a model_type of model_types, got {tiny_type!r}, "
            f"claimed: {', '.join(adapter.model_types)}"
        )
        Registry.of(adapter)

    @check(
        "declaration.capabilities",
        "Each declared capability is one that core knows, and every limit gives its reason.",
        look="`capabilities` of the adapter",
    )
    def test_capabilities(self, subject: Subject) -> None:
        for name, capability in subject.adapter.capabilities.items():
            check_capability(subject.adapter.name, name)
            assert capability.support == "full" or len(capability.reason) > 10, (
                f"capabilities[{name!r}]: expected a reason why it is {capability.support}, "
                f"got {capability.reason!r}"
            )

    @check(
        "declaration.unsupported",
        "What is declared unsupported is refused with the adapter's own reason, not answered.",
        look="`capabilities` of the adapter; core refuses what they say",
    )
    def test_unsupported(self, subject: Subject) -> None:
        for name, capability in subject.adapter.capabilities.items():
            if capability.support == "full":
                continue
            with refused(UnsupportedError, f"a use of {name}") as refusal:
                ASKS[name](subject)
            refusal.says(capability.reason)

    @check(
        "declaration.pure",
        "A declaration says the same when asked again, and leaves the config that it reads alone.",
        look="layout(), source(), experts(), caches(), tiny_config(): return new objects, change "
        "no argument",
    )
    def test_pure(self, subject: Subject) -> None:
        adapter, config = subject.adapter, subject.config
        made = kept_names(subject, config)
        names = sorted(made.forms)
        before = copy.deepcopy(config)
        declarations: dict[str, Callable[[dict[str, Any]], object]] = {
            "layout": adapter.layout,
            "caches": adapter.caches,
            "weights": lambda config: _told(adapter, config, names, made.parameters),
        }
        for method, ask in declarations.items():
            first, second = ask(config), ask(config)
            assert first == second, (
                f"{method}(): expected the same twice, got {told(first)}, then {told(second)}"
            )
            changed = [key for key in {**before, **config} if config.get(key) != before.get(key)]
            assert not changed, (
                f"{method}(): expected the config unchanged, got another {changed[0]!r}"
            )
        tiny = copy.deepcopy(adapter.tiny_config())
        again = adapter.tiny_config()
        assert again == tiny, f"tiny_config(): expected the same twice, got {_differs(again, tiny)}"
        model_config(adapter.tiny_config())
        again = adapter.tiny_config()
        assert again == tiny, (
            f"tiny_config(): expected a new object at each call, got {_differs(again, tiny)} "
            "from transformers"
        )

    @check(
        "declaration.new-objects",
        "What tiny_config() and catalog() give out is their caller's to change: the next call "
        "gives what the first one gave.",
        look="tiny_config(), catalog(): a constant is everybody's, its lists and objects too",
    )
    def test_new_objects(self, subject: Subject) -> None:
        adapter = subject.adapter
        asked: dict[str, Callable[[], list[Config]]] = {
            "tiny_config()": lambda: [adapter.tiny_config()],
            "catalog()": lambda: [entry.config for entry in adapter.catalog()],
        }
        for method, ask in asked.items():
            before = copy.deepcopy(ask())
            with spoiled(ask()):
                again = copy.deepcopy(ask())
            for expected, got in zip(before, again, strict=True):
                assert got == expected, (
                    f"{method}, after what it gave before was changed: expected the same, got "
                    f"{_differs(got, expected)}"
                )

    @check(
        "declaration.tiny-config",
        "The tiny model is small, long enough for the checks, and groups its KV heads.",
        look="tiny_config() of the adapter",
    )
    def test_tiny_config(self, subject: Subject) -> None:
        check_json(subject.config, "tiny_config()")
        model = meta_model(subject.config)
        num_bytes = 4 * sum(p.numel() for p in model.parameters())
        assert num_bytes < 64_000_000, (
            f"tiny_config(): expected less than 64 MB in float32, got {num_bytes} bytes"
        )
        positions = model.config.get_text_config().max_position_embeddings
        assert positions >= 2 * PROMPT, (
            f"tiny_config(), max_position_embeddings: expected {2 * PROMPT} or more, "
            f"got {positions}"
        )
        layers = subject.adapter.layout(subject.config).num_layers
        assert layers >= 2, f"tiny_config(): expected two layers or more, got {layers}"
        kinds = {(k.kind, k.window) for k in subject.adapter.caches(subject.config)}
        for kind, window in kinds:
            assert window is None or window < PROMPT, (
                f"tiny_config(): expected {kind} windows below {PROMPT} tokens, so that prompts "
                "cross them, "
                f"got {window}"
            )

    @check(
        "declaration.layout",
        "Every path of the layout leads to the module it names in the transformers tree.",
        look="layout() of the adapter",
    )
    def test_layout(self, subject: Subject) -> None:
        layout, model = subject.adapter.layout(subject.config), meta_model(subject.config)
        check_paths(model, layout)
        found = len(list(model.get_submodule(layout.layers).children()))
        assert found == layout.num_layers, (
            f"layout().num_layers: expected {found}, got {layout.num_layers}"
        )
        embedding = model.get_submodule(layout.embedding)
        assert embedding is model.get_input_embeddings(), (
            f"layout().embedding: expected the input embedding at {layout.embedding}, got "
            f"{type(embedding).__name__}"
        )
        head = model.get_submodule(layout.head)
        assert head is model.get_output_embeddings(), (
            f"layout().head: expected the output head at {layout.head}, got {type(head).__name__}"
        )

    @check(
        "declaration.outside-layers",
        "Core runs all that transformers computes, in the tiny model and every one of the catalog.",
        look="layout(); what core cannot run is named, and needs another adapter or a newer core",
    )
    def test_outside_layers(self, subject: Subject) -> None:
        adapter = subject.adapter
        configs: list[tuple[str, Config]] = [("tiny_config()", subject.config)]
        configs += [(entry.id, entry.config) for entry in adapter.catalog()]
        for name, whole in configs:
            config = adapter.text_config(whole)
            try:
                check_model(config, adapter.layout(config))
            except OllmError as error:
                raise AssertionError(f"{name}: {error}") from error

    @check(
        "declaration.halves",
        "Where a layer is run in two halves, they compute what transformers' layer does.",
        look="mixer and mlp of layout(): norms, residuals and multipliers included",
    )
    def test_halves(self, subject: Subject) -> None:
        if not subject.adapter.layout(subject.config).experts:
            does_not_apply("no layer has routed experts")
        check_halves(subject.adapter, subject.tiny(), subject.registry)

    @check(
        "declaration.catalog",
        "Every model of the catalog opens by its id, with the sizes that its config gives.",
        look="catalog() of the adapter",
    )
    def test_catalog(self, subject: Subject) -> None:
        entries = subject.adapter.catalog()
        if not entries:
            does_not_apply("the catalog is empty")
        for entry in entries:
            check_json(entry.config, entry.id)
            found = subject.registry.find(entry.id)[1]
            assert found == entry, f"{entry.id}: expected to be found by its id, got {found.id}"
            assert entry.config.get("model_type") in subject.adapter.model_types, (
                f"{entry.id}: expected a claimed model type, got {entry.config.get('model_type')!r}"
            )
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo), (
                f"{entry.id}: expected a repository OWNER/NAME, got {entry.repo!r}"
            )
            model = meta_model(entry.config)
            num_parameters = sum(p.numel() for p in model.parameters())
            assert entry.num_parameters == num_parameters, (
                f"{entry.id}: expected {num_parameters} parameters, got {entry.num_parameters}"
            )
            assert 0 < entry.weight_bytes <= 4 * num_parameters, (
                f"{entry.id}: expected weight_bytes of {num_parameters} parameters, "
                f"got {entry.weight_bytes}"
            )

    @check(
        "declaration.hostile-config",
        "A config.json with a missing, absurd or mistyped field is refused in one clear line.",
        look="layout(), layer_parameters(), source(), experts(), caches(): check each field before "
        "it is used, by read_size or bad_config of ollm_core",
    )
    def test_hostile_config(self, subject: Subject) -> None:
        adapter, good = subject.adapter, subject.config
        names = sorted(kept_names(subject, good).forms)
        for key in good:
            for value in _BAD_VALUES:
                self._refused_or_fine(adapter, {**good, key: value}, names, f"{key} = {value!r}")

    @staticmethod
    def _refused_or_fine(
        adapter: ModelAdapter, config: dict[str, Any], names: list[str], what: str
    ) -> None:
        try:
            adapter.layout(config)
            adapter.caches(config)
            adapter.weights(config, names)
        except OllmError as error:
            line = str(error)
        except Exception as error:
            raise AssertionError(
                f"{what}: expected a ConfigError or nothing, got {type(error).__name__}: {error}"
            ) from error
        else:
            return
        assert "\n" not in line, f"{what}: expected one line, got {line!r}"


def check_json(config: Config, what: str) -> None:
    """Raises AssertionError for a config that no config.json can hold."""
    try:
        json.dumps(dict(config))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{what}: expected what JSON can hold, got: {error}") from error


def _differs(found: Config, expected: Config) -> str:
    """The first key whose value is another, with both."""
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            return f"{key} = {told(found.get(key))} in place of {told(expected.get(key))}"
    return "an equal one"


def _told(
    adapter: ModelAdapter, config: dict[str, Any], names: list[str], parameters: Iterable[str]
) -> Any:
    plan = adapter.weights(config, names)
    sources = {**plan.parameters, **plan.experts}
    return {name: sources[name] for name in parameters}, plan.ignored
