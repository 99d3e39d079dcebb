"""The plugin that brings the verb `ollm conformance`. Imports nothing that is slow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ollm_core import hookimpl

if TYPE_CHECKING:
    import click

    from ollm_core.requests import CommandFactory


@hookimpl
def ollm_commands() -> Mapping[str, CommandFactory]:
    """The one verb of this distribution."""
    return {"conformance": _conformance}


def _conformance() -> click.Command:
    from ollm_conformance.cli import conformance

    return conformance
