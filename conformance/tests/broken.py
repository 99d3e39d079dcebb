"""How something deliberately broken is written down: what is wrong, and the check meant for it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ollm_conformance import AdapterConformance


@dataclass(frozen=True, slots=True)
class Broken:
    """A test class for something broken, and the id of the check that must fail."""

    name: str
    sentence: str
    suite: type
    check: str


@dataclass(frozen=True, slots=True)
class Unseen:
    """A test class for something broken of which no check is known that it must fail."""

    name: str
    sentence: str
    suite: type


@dataclass(frozen=True, slots=True)
class BrokenPart:
    """A part with one fault."""

    name: str
    fault: str
    """One sentence: what it does wrong."""
    suite: type
    """The test class that runs it."""
    check: str
    """The check that is meant to find the fault."""


def broken_adapter(check, sentence, adapter, **attributes):
    """An entry for an adapter class; `attributes` go to its test class."""
    name = adapter.__name__
    for replaced in attributes.keys() & {"load", "dry_run"}:
        name = attributes[replaced].__name__
        attributes[replaced] = staticmethod(attributes[replaced])
    suite = type(f"Test{name}", (AdapterConformance,), {"adapter": adapter, **attributes})
    return Broken(name, sentence, suite, check)


def unseen(sentence, adapter, **attributes):
    """An `Unseen` for an adapter class; `attributes` go to its test class."""
    made = broken_adapter("", sentence, adapter, **attributes)
    return Unseen(made.name, made.sentence, made.suite)


def while_it_runs(owner, name, fault):
    """A fixture for a test class: `name` of `owner` is `fault` while its tests run."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def broken(cls):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, fault)
            yield

    return broken
