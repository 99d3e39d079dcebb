"""Verbs and option values that plugins add to the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import click

from ollm_core.errors import InputError, OllmError, PluginError
from ollm_core.plugins.loader import KINDS

if TYPE_CHECKING:
    from ollm_core.plugins.loader import Offer
    from ollm_core.plugins.registry import Registry

_HOOK = "ollm_commands"
_ELSEWHERE = {"adapter": "ollm-conformance", "conformance": "ollm-conformance"}
"""Verbs that the documentation names, and the distributions that bring them."""


def check_offered(hook: str) -> Callable[[click.Context, click.Parameter, str], str]:
    """A click callback: the value must be built in, or a name that a plugin offers through `hook`.
    Plugins are looked for only if the name is not built in.
    """

    def check(context: click.Context, parameter: click.Parameter, value: str) -> str:
        if value not in KINDS[hook].built_in:
            try:
                _registry().check_name(hook, value)
            except OllmError as error:
                named = parameter.get_error_hint(context).strip("'")
                raise InputError(f"{named}: {error.message}", hint=error.hint) from error
        return value

    return check


class Verbs(click.Group):
    """The verbs of oLLM itself, and those of plugins, which are looked for only when they are
    needed: for --help, and for a name that is no verb of oLLM.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, sorted."""
        return sorted({*super().list_commands(ctx), *_registry().offers(_HOOK)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb; one that cannot be loaded says so when it is run."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            return command
        offer = _registry().offers(_HOOK).get(cmd_name)
        if offer is not None:
            return _command(offer)
        if cmd_name in _ELSEWHERE:
            return _Broken(cmd_name, _not_here(cmd_name))
        return None

    def invoke(self, ctx: click.Context) -> None:
        """Run a verb. What it returns is dropped: it is no exit code."""
        super().invoke(ctx)


def _command(offer: Offer) -> click.Command:
    try:
        made: click.Command = offer.make(click.Command)
    except OllmError as error:
        return _Broken(offer.name, error)
    made.name = offer.name
    return made


def _not_here(verb: str) -> PluginError:
    distribution = _ELSEWHERE[verb]
    return PluginError(
        f"`ollm {verb}` is a verb of {distribution}, which is not installed or not loaded",
        hint=f"pip install {distribution}; `ollm plugins` shows what is loaded",
    )


class _Broken(click.Command):
    """Stands for a verb whose plugin failed when it was asked for it, or is not there."""

    def __init__(self, name: str, error: OllmError) -> None:
        super().__init__(name, short_help="(cannot be loaded)", add_help_option=False)
        self._error = error

    def make_context(self, *_: object, **__: object) -> NoReturn:
        """Raises what making the verb raised."""
        raise self._error


def _registry() -> Registry:
    from ollm_core.plugins.registry import Registry

    return Registry.discover()
