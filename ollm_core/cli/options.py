"""Flags of the verbs: those of `ollm_core.options`, and those that any verb takes."""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ollm_core.cli.offered import check_offered
from ollm_core.cli.settings import Setting
from ollm_core.files.paths import absolute
from ollm_core.option_fields import about, default_text
from ollm_core.options import OPTIONS

Command = TypeVar("Command", bound=Callable[..., Any])

STDIN = "-"
"""What stands for it where a file is named."""


def options_of(verb: str) -> Callable[[Command], Command]:
    """Every option that `verb` has a flag for, as arguments of the same names."""

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def command(**options: Any) -> Any:
            return function(**options | _passed_over(verb, options))

        for name in reversed(names_of(verb)):
            command = _flag(OPTIONS[name], verb)(command)
        return cast("Command", command)

    return decorate


def _passed_over(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that mean nothing beside the others and that no flag gives: as if not set."""
    flags = set(filter(is_flag, names_of(verb)))
    return {
        name: OPTIONS[name].default
        for name in names_of(verb)
        if name not in flags and about(OPTIONS[name]).idle(options, flags)
    }


def is_flag(name: str) -> bool:
    """Whether the command line that is being run gives an option, and not a variable or a file."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def names_of(verb: str) -> list[str]:
    """The options that `verb` has a flag for."""
    return [name for name, option in OPTIONS.items() if verb in about(option).verbs]


def keywords_of(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a command line gave, the options that `verb` has, as keywords of its function."""
    return {name: options[name] for name in names_of(verb) if name in options}


def help_text(option: Field[Any]) -> str:
    """What `--help` says: other options by their flags, and the default."""
    text = re.sub(r"`(\w+)`", lambda match: _flag_name(match[1]), about(option).help)
    return f"{text}  [default: {default_text(option)}]"


def _flag(option: Field[Any], verb: str) -> Callable[[Command], Command]:
    known, name = about(option), "--" + option.name.replace("_", "-")
    settings: dict[str, Any] = {
        "cls": Setting,
        "known": known,
        "default": option.default,
        "help": help_text(option),
    }
    if isinstance(option.default, bool):
        settings["is_flag"] = True
        if option.default:
            name += f"/--no-{option.name.replace('_', '-')}"
    elif known.takes_plugins(verb):
        settings["metavar"] = f"[{'|'.join(known.choices)}|PLUGIN]"
        settings["callback"] = check_offered(known.hook)
        settings["shell_complete"] = _those_built_in
    elif known.choices:
        settings["type"] = click.Choice(known.choices)
    elif known.least is not None:
        settings["type"] = click.IntRange(known.least)
    else:
        settings["metavar"] = known.metavar
    return click.option(name, **settings)


def _those_built_in(_: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    assert isinstance(parameter, Setting)
    return [one for one in parameter.known.choices if one.startswith(incomplete)]


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-") if name in OPTIONS else f"`{name}`"


class _UserPath(click.ParamType):  # type: ignore[type-arg] # generic in newer releases
    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value) if os.fspath(value) == STDIN else absolute(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


user_path = _UserPath()
"""The type of options that name a file or directory: `~` is expanded, and the path holds wherever
the process goes. `-` stays as it is. Raises InputError.
"""


def json_option(command: Command) -> Command:
    """`--json`, as the argument `as_json`."""
    text = "Print one JSON object on stdout, and nothing else there."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def dtype_option(text: str) -> Callable[[Command], Command]:
    """`--dtype` of a verb that opens no model, with its help text."""
    dtypes = click.Choice(["bfloat16", "float16", "float32"])
    return click.option("--dtype", type=dtypes, default="bfloat16", show_default=True, help=text)


def debug_option(command: Command) -> Command:
    """`--debug`, which any verb and the group take; it shows what `quiet` and `main` hide."""
    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_debug,
        help="Show tracebacks, and what the libraries log.",
    )(command)


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True
        logging.disable(logging.NOTSET)
        warnings.simplefilter("default")
