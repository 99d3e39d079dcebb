"""The plugin that brings the verbs `ollm adapter` and `ollm conformance`. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ollm_core import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def ollm_commands() -> Mapping[str, Callable[[], click.Command]]:
    """The verbs of this distribution."""
    return {"adapter": _adapter, "conformance": _conformance}


def _adapter() -> click.Command:
    from ollm_conformance.new_adapter import adapter

    return adapter


def _conformance() -> click.Command:
    from ollm_conformance.cli import conformance

    return conformance
