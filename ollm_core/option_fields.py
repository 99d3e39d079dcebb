"""Fields of options by kind, each with what is known of it: its check, help text and flag. Loads no
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, cast

from ollm_core.errors import InputError
from ollm_core.files.paths import absolute
from ollm_core.memory.sizes import parse_size
from ollm_core.plugins.loader import KINDS
from ollm_core.values import Count, count, one_of


@dataclass(frozen=True, slots=True)
class About:
    """What is known of an option besides its name, type and default. In its texts, `name` means
    another option; the command line shows that as --name.
    """

    help: str
    """One line."""
    more: str = ""
    """What help() and docs/generated/options.md say after it."""
    verbs: tuple[str, ...] = ()
    """Those that have a flag for it."""
    unset: str = ""
    """What its default None means."""
    metavar: str = ""
    """What its value is, for example SIZE."""
    choices: tuple[str, ...] = ()
    hook: str = ""
    """Through which plugins offer more names than `choices`."""
    without_plugins: tuple[str, ...] = ()
    """Verbs that take `choices` alone."""
    least: int | None = None
    """Of a whole number."""
    variable: str = ""
    """The one that sets it; empty for OLLM_ and its name."""
    user_only: bool = False
    """Whether it is never taken from a project's file, which somebody else may have written: what
    runs code, opens a server to others, or names what outlives a run.
    """
    idle: Callable[[Mapping[str, Any], Container[str]], bool] = lambda _, __: False
    """(all options, names of those that a flag gives) -> whether it means nothing beside the
    others. A flag is then refused; what a variable or a file says, perhaps for other commands, is
    passed over.
    """
    secret: bool = False
    """Whether its value is never shown."""
    check: Callable[[str, Any], Any] = lambda _, value: value
    """(name, value) -> the value in the form that is kept. Raises InputError."""

    def takes_plugins(self, verb: str) -> bool:
        """Whether `verb` also takes a name that a plugin offers."""
        return bool(self.hook) and verb not in self.without_plugins


def said(default: Any, help: str, more: str = "", **known: Any) -> Any:
    """A field of any type; `known` are more fields of About, here and below."""
    return field(default=default, metadata={"about": About(help, more, **known)})


def choice(default: str, choices: tuple[str, ...], help: str, more: str, **known: Any) -> Any:
    """One of some words."""

    def check(name: str, value: str) -> str:
        one_of(name, value, choices)
        return value

    return said(default, help, more, **{"choices": choices, "check": check, **known})


def offered(default: str, hook: str, help: str, more: str, **known: Any) -> Any:
    """A name that is built in, or that a plugin offers. Which those are is known to a registry: see
    `ModelOptions.check_names`.
    """
    return said(default, help, more, choices=KINDS[hook].built_in, hook=hook, **known)


def counted(default: int | None, least: int, help: str, more: str = "", **known: Any) -> Any:
    """A whole number from `least` on."""

    def check(name: str, value: Count) -> int:
        return count(name, value, least)

    return said(default, help, more, least=least, check=check, **known)


def size(default: None, help: str, more: str = "", **known: Any) -> Any:
    """A number of bytes."""
    return said(default, help, more, metavar="SIZE", check=called_by(parse_size), **known)


def directory(default: None, help: str, more: str = "", **known: Any) -> Any:
    """A directory, made absolute."""
    return said(default, help, more, **{"metavar": "DIR", "check": called_by(absolute), **known})


def switch(default: bool, help: str, more: str, **known: Any) -> Any:
    """On or off."""

    def check(name: str, value: bool) -> bool:
        if not isinstance(value, bool):  # "no" is true
            raise InputError(f"{name} is {value!r}, expected True or False")
        return value

    return said(default, help, more, check=check, **known)


def called_by(read: Callable[[Any], Any]) -> Callable[[str, Any], Any]:
    """The check of an option by `read`, whose message needs no name."""
    return lambda _, value: read(value)


def about(option: Field[Any]) -> About:
    """What is known of a field that a function above has made."""
    return cast("About", option.metadata["about"])


def default_text(option: Field[Any]) -> str:
    """Its default in words."""
    if option.default is None:
        return about(option).unset
    if isinstance(option.default, bool):
        return "on" if option.default else "off"
    return str(option.default)
