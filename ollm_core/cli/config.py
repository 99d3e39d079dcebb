"""The verb `config`: which options are set, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ollm_core.cli.config_files import user_file
from ollm_core.cli.options import debug_option, json_option
from ollm_core.cli.output import print_json, print_table
from ollm_core.cli.settings import Setting, configured, settings_of, unknown_variables
from ollm_core.errors import InputError
from ollm_core.option_fields import default_text
from ollm_core.options import OPTIONS

if TYPE_CHECKING:
    Row = tuple[str, str, Any, str]
    """Verb, option, value, and where it was set."""

_HIDDEN = "(set, not shown)"


@click.group(short_help="Show which options are set, and where.")
def config() -> None:
    """Options of the verbs, from flags, variables and files.

    A flag goes over an environment variable (OLLM_DEVICE_MEMORY), that over the project's
    ollm.toml, and that over your own config file.
    """


@config.command()
@click.argument("verb", required=False)
@click.option("--origin", is_flag=True, help="Say where each value was set.")
@json_option
@debug_option
@click.pass_context
def show(context: click.Context, verb: str | None, origin: bool, as_json: bool) -> None:
    """Show the value that each option has if no flag is given, of VERB or of all verbs.

    Where verbs differ, each has a line. Secrets are not shown.
    """
    root = context.find_root()
    verbs = settings_of(root.command)
    if verb is not None and verb not in verbs:
        raise InputError(f"`ollm {verb}` has no options to set", hint=f"one of: {', '.join(verbs)}")
    chosen = verbs if verb is None else {verb: verbs[verb]}
    rows = [row for name, settings in chosen.items() for row in _rows(root, name, settings)]
    files = [str(one.path) for one in configured(context).files]
    if as_json:
        print_json({"options": [_fields(row) for row in rows], "files": files})
        return
    shown = [(name, _text(name, value), where) for name, value, where in _together(rows)]
    head = ("OPTION", "VALUE", "SET BY")
    print_table([row if origin else row[:2] for row in (head, *shown)])
    click.echo(f"\nfiles: {', '.join(files) or f'none; yours would be {user_file()}'}", err=True)
    for strange, meant in unknown_variables(verbs).items():
        click.echo(f"warning: {strange} sets nothing; did you mean {meant}?", err=True)


def _rows(root: click.Context, verb: str, settings: Mapping[str, Setting]) -> list[Row]:
    """What a command line without flags would have. Raises what that would."""
    assert isinstance(root.command, click.Group)
    context = click.Context(root.command.commands[verb], parent=root, info_name=verb)
    rows = []
    for key, setting in settings.items():
        setting.handle_parse_result(context, {}, [])
        value = context.params[key]
        if setting.known.secret and value is not None:
            value = _HIDDEN
        rows.append((verb, key, value, setting.origin(context)))
    return rows


def _together(rows: Sequence[Row]) -> list[tuple[str, Any, str]]:
    """One line for an option that all verbs have alike, else one for each: `run.kv`."""
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row[1], []).append(row)
    lines = []
    for key, same in of.items():
        if len({(str(value), where) for _, _, value, where in same}) == 1:
            lines.append((key, *same[0][2:]))
        else:
            lines += [(f"{verb}.{key}", value, where) for verb, _, value, where in same]
    return lines


def _text(name: str, value: Any) -> str:
    key = name.rpartition(".")[2]
    if value is None:
        return f"({default_text(OPTIONS[key])})" if key in OPTIONS else "(none)"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _fields(row: Row) -> dict[str, Any]:
    return dict(zip(("verb", "option", "value", "origin"), row, strict=True))
