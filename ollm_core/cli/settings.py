"""Options that a flag, an environment variable or a file sets, in this order.

A `Setting` is a flag that has the other two by its name: `--device-memory`, `OLLM_DEVICE_MEMORY`,
and the key `device_memory`, at the top of a file for every verb or in a verb's table. Which values
go over which is click's own: its `envvar` and `default_map`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click
from click.core import ParameterSource

from ollm_core.cli.config_files import ConfigFile, Entry, config_files, user_file
from ollm_core.errors import InputError
from ollm_core.files.paths import absolute
from ollm_core.files.untrusted_json import show
from ollm_core.option_fields import About
from ollm_core.plugins.registry import LOAD_PLUGINS

PREFIX = "OLLM_"
_CONFIGURED = "ollm_core.cli.settings"
_TEXTS: dict[str, tuple[tuple[type[Any], ...], str]] = {
    "SIZE": ((str,), 'a size, for example "8GB"'),
    "TOKENS": ((str, int), 'a number of tokens, for example "100k"'),
}
"""By metavar: what texts of a form may be in a file, and what to call them."""


class Setting(click.Option):
    """A flag with a variable and a key."""

    def __init__(self, *arguments: Any, known: About | None = None, **more: Any) -> None:
        """`known` is what is known of it, where it is a field of an options class."""
        super().__init__(*arguments, **more)
        self.known = known or About("")
        self.envvar = self.known.variable or f"{PREFIX}{self.key.upper()}"

    @property
    def key(self) -> str:
        """In files."""
        return str(self.name)

    @property
    def variable(self) -> str:
        """In the environment."""
        return str(self.envvar)

    def consume_value(
        self, ctx: click.Context, opts: Mapping[str, Any]
    ) -> tuple[Any, ParameterSource]:
        """click's, which looks into the files when the first setting is wanted: not for --help."""
        if ctx.default_map is None and not ctx.resilient_parsing:
            ctx.default_map = configured(ctx).values.get(str(ctx.command.name), {})
        return super().consume_value(ctx, opts)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """click's, and a check of what no flag shows: it is named by where it stands."""
        cast = super().type_cast_value(ctx, value)
        if cast is not None and self._source(ctx) is ParameterSource.ENVIRONMENT:
            self.check(cast, self.variable)
        return cast

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """What set it: the flag, the variable, or the line of a file."""
        if ctx and self._source(ctx) is ParameterSource.ENVIRONMENT:
            return self.variable
        if ctx and self._source(ctx) is ParameterSource.DEFAULT_MAP:
            return f"{self.origin(ctx)}: {self.key}"
        return super().get_error_hint(ctx)

    def origin(self, ctx: click.Context) -> str:
        """Where its value came from: "default", a flag, a variable, or a line of a file."""
        source = self._source(ctx)
        if source is ParameterSource.DEFAULT_MAP:
            return configured(ctx).origins[str(ctx.command.name), self.key]
        if source is ParameterSource.ENVIRONMENT:
            return self.variable
        return "default" if source is ParameterSource.DEFAULT else self.opts[0]

    def check(self, value: Any, where: str) -> None:
        """Raises InputError for a text that its options class would refuse. No plugin is asked."""
        if self.known.choices or not isinstance(value, str):
            return
        try:
            self.known.check(self.key, value)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", hint=error.hint) from error

    def _source(self, ctx: click.Context) -> ParameterSource | None:
        return ctx.get_parameter_source(self.key)


@dataclass(slots=True)
class Configured:
    """What files set."""

    files: list[ConfigFile]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By verb and key: click's default_map of each verb."""
    origins: dict[tuple[str, str], str] = field(default_factory=dict)
    """Where each was set, by verb and key."""


def configured(ctx: click.Context) -> Configured:
    """What files set, read once for a command line. Raises InputError for a file with a fault."""
    known: Configured | None = ctx.meta.get(_CONFIGURED)
    if known is None:
        known = ctx.meta[_CONFIGURED] = _configured(settings_of(ctx.find_root().command))
    return known


def settings_of(root: click.Command) -> dict[str, dict[str, Setting]]:
    """Every setting by verb and key. Verbs of plugins have none."""
    verbs = root.commands if isinstance(root, click.Group) else {str(root.name): root}
    found = {
        verb: {one.key: one for one in command.params if isinstance(one, Setting)}
        for verb, command in verbs.items()
    }
    return {verb: settings for verb, settings in found.items() if settings}


def unknown_variables(verbs: Mapping[str, Mapping[str, Setting]]) -> dict[str, str]:
    """Variables of the environment that look like a misspelled option, and what is meant."""
    names = {one.variable for settings in verbs.values() for one in settings.values()}
    known = {one.removeprefix(PREFIX) for one in (*names, LOAD_PLUGINS)}
    told = sorted(one for one in os.environ if one.startswith(PREFIX))
    close = {one: _closest(one.removeprefix(PREFIX), known) for one in told}
    return {one: PREFIX + meant for one, meant in close.items() if meant and one != PREFIX + meant}


def _configured(verbs: Mapping[str, Mapping[str, Setting]]) -> Configured:
    made = Configured(config_files())
    for file in made.files:
        for entry in sorted(file.entries(), key=lambda entry: entry.table != ""):
            for verb, setting in _meant(entry, verbs).items():
                value = _value(entry, setting)
                made.values.setdefault(verb, {})[setting.key] = value
                made.origins[verb, setting.key] = entry.where
    return made


def _meant(entry: Entry, verbs: Mapping[str, Mapping[str, Setting]]) -> dict[str, Setting]:
    """The setting that an entry is for, by verb. Raises InputError for a name that is none."""
    if entry.table and entry.table not in verbs:
        raise _unknown(f"{entry.file.path}: there is no table", entry.table, verbs)
    wanted = [entry.table] if entry.table else list(verbs)
    found = {verb: verbs[verb][entry.key] for verb in wanted if entry.key in verbs[verb]}
    if not found and entry.key:
        names = {key for verb in wanted for key in verbs[verb]}
        of = f"of `ollm {entry.table}` " if entry.table else ""
        raise _unknown(f"{entry.where}: there is no option {of}named", entry.key, names)
    return found


def _unknown(message: str, name: str, names: Iterable[str]) -> InputError:
    meant = _closest(name.replace("-", "_"), names) or _closest(name, names)
    hint = f"did you mean {meant}?" if meant else "`ollm config show` lists them"
    return InputError(f"{message} {show(name)}", hint=hint)


def _closest(name: str, names: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def _value(entry: Entry, setting: Setting) -> Any:
    """In the form that click wants. Raises InputError for what may not be set here, and for a value
    of another kind.
    """
    if entry.file.is_project and setting.known.user_only:
        ways = [setting.opts[0], setting.variable, *([str(file)] if (file := user_file()) else [])]
        raise InputError(
            f"{entry.where}: {setting.key} is not taken from a project's file",
            hint=f"somebody else may have written it; set it yourself, by {', '.join(ways)}",
        )
    if setting.known.secret and not entry.file.private:
        raise InputError(
            f"{entry.where}: {setting.key}: other users can read the file",
            hint=f"chmod 600 {entry.file.path}",
        )
    allowed, wanted = _kinds(setting)
    if not isinstance(entry.value, allowed) or (
        isinstance(entry.value, bool) and bool not in allowed
    ):
        have = "" if setting.known.secret else f", have {show(entry.value)}"
        raise InputError(f"{entry.where}: {setting.key}: need {wanted}{have}")
    value = str(entry.value) if str in allowed else entry.value
    if setting.known.hook:
        return value  # its verb knows whether a plugin offers it
    try:
        setting.type.convert(value, setting, None)
    except click.BadParameter as error:
        raise InputError(f"{entry.where}: {setting.key}: {error.message}") from error
    setting.check(value, entry.where)
    if setting.known.metavar == "DIR":
        return str(absolute(entry.file.path.parent / os.path.expanduser(value)))
    return value


def _kinds(setting: Setting) -> tuple[tuple[type[Any], ...], str]:
    """The types of TOML that it takes, and what to call them."""
    if setting.is_flag:
        return (bool,), "true or false"
    if isinstance(setting.type, click.types.IntParamType):
        least = getattr(setting.type, "min", None)
        return (int,), "a whole number" + (f" of at least {least}" if least is not None else "")
    if isinstance(setting.type, click.types.FloatParamType):
        return (int, float), "a number"
    if setting.known.choices:
        others = ", or one of a plugin" if setting.known.hook else ""
        return (str,), f"one of {', '.join(setting.known.choices)}{others}"
    return _TEXTS.get(setting.known.metavar, ((str,), "text"))
