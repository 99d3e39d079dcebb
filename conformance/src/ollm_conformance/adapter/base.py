"""What every group of adapter checks shares: the subject, and how a test class names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import ollm
from ollm_conformance.checks import UNSUPPORTED, check_of
from ollm_conformance.models import meta_model
from ollm_conformance.naming import kept_names
from ollm_conformance.subject import Subject
from ollm_core import Config, ModelAdapter, OllmError
from ollm_core.testing import (
    DryRun,
    PluginError,
    Registry,
    StreamedModel,
    check_declarations,
    supports,
    told,
)


class AdapterSuite:
    """Base of the groups. Test authors subclass AdapterConformance, which has them all."""

    adapter: ClassVar[type[ModelAdapter] | ModelAdapter | None] = None
    """The adapter to test. None: the installed one that `--ollm-adapter` names."""
    tiny_config: ClassVar[Config | None] = None
    """A tiny config beside the adapter's own, for a family that is published in several forms."""
    small_configs: ClassVar[Mapping[str, Config]] = {}
    """Small configs of catalog entries by id, where those that the suite makes are none."""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Check id to the reason why it fails. One that passes after all is a failure."""
    checkpoint: ClassVar[Path | None] = None
    """A directory with a real model of the family, for the checks of its tokenizer."""
    load: ClassVar[Callable[..., StreamedModel]] = staticmethod(ollm.load)
    """How a model is opened; for testing the suite itself."""
    dry_run: ClassVar[type[DryRun]] = DryRun
    """How a model is planned; for testing the suite itself."""
    shrinking_seconds: ClassVar[float] = 5
    """For so long a random walk, or a random config, that fails is made smaller."""

    @classmethod
    def subject_name(cls, config: pytest.Config) -> str:
        """The name that results carry."""
        if cls.adapter is None:
            return str(config.getoption("ollm_adapter"))
        return str(getattr(cls.adapter, "name", cls.__name__))

    @pytest.fixture(scope="class")
    @classmethod
    def subject(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Subject:
        """The adapter under test, one for the class, so that what it makes is made once."""
        if cls.adapter is None:
            adapter = installed_adapter(request.config.getoption("ollm_adapter"))
        else:
            adapter = cls.adapter() if isinstance(cls.adapter, type) else cls.adapter
        directory = tmp_path_factory.mktemp("adapter")
        checkpoint = cls.checkpoint or request.config.getoption("ollm_checkpoint")
        subject = Subject(
            adapter,
            directory,
            cls.load,
            checkpoint,
            cls.tiny_config,
            cls.dry_run,
            cls.small_configs,
        )
        check_usable(subject)
        return subject

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Tiny models are quickest on one thread; on a busy machine by far."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    @pytest.fixture(autouse=True)
    def _only_what_is_supported(self, request: pytest.FixtureRequest) -> None:
        """A check of what the adapter declares not to do is not run; that it refuses is another
        check.
        """
        found = check_of(request.node)
        needs = [*found.needs, *_needs_of_case(request.node)] if found else []
        if not needs:
            return
        subject: Subject = request.getfixturevalue("subject")
        for need in needs:
            if not supports(subject.adapter, need):
                reason = subject.adapter.capabilities[need].reason
                pytest.skip(f"{UNSUPPORTED}{need}: {reason}")


def _needs_of_case(item: pytest.Function) -> Iterator[str]:
    """What one case of a check needs, by its parameters."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "kv" in parameters:
        yield f"kv-{parameters['kv']}"
    if parameters.get("attention") == "blockwise":
        yield "blockwise-attention"


def check_usable(subject: Subject) -> None:
    """Raises AssertionError, in a sentence, for an adapter of which no check could say more: one
    that the registry refuses, or whose declarations of its own tiny config are not what they are
    called.
    """
    adapter = subject.given_adapter
    try:
        Registry.of(adapter)
        check_tiny(subject.given_config)
        check_declarations(
            adapter, subject.config, lambda config: sorted(kept_names(subject, config).forms)
        )
    except PluginError as error:
        raise AssertionError(f"expected an adapter that can be used, got: {error}") from error
    except OllmError:
        return  # a check says which


def check_tiny(config: object) -> None:
    """Raises AssertionError unless `config` is one that transformers makes a model of."""
    got = told(config)
    assert isinstance(config, Mapping), f"tiny_config(): expected a mapping, got {got}"
    family = config.get("model_type")
    assert isinstance(family, str), (
        f"tiny_config(): expected a `model_type`, as config.json has it, got {told(family)}"
    )
    try:
        meta_model(config)
    except Exception as error:
        text = " ".join(str(error).split())
        raise AssertionError(
            f"tiny_config(): expected a config of which transformers makes a {family!a} model, "
            f"got {type(error).__name__}: {text}"
        ) from error


def installed_adapter(name: str | None) -> ModelAdapter:
    """The adapter that is installed under `name`. Raises UsageError if there is none."""
    registry = Registry.discover()
    if name is None:
        raise pytest.UsageError(
            "which adapter? give --ollm-adapter NAME; installed: "
            f"{', '.join(sorted(registry.adapters)) or 'none'}"
        )
    if name not in registry.adapters:
        failed = "".join(
            f"; plugin {p}: {p.reason}" for p in registry.plugins if p.status == "failed"
        )
        raise pytest.UsageError(
            f"no adapter {name!r} is installed; installed: "
            f"{', '.join(sorted(registry.adapters)) or 'none'}{failed}"
        )
    return registry.adapters[name]
