"""`ollm adapter new`: the project of an adapter, made from the template that this package carries.

The template is one for copier: `template/copier.yml` has the questions with what may be answered,
`template/project` the files. copier is imported when a project is made, and not before.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import click

from ollm_conformance import __version__
from ollm_core import InputError

TEMPLATE = Path(__file__).with_name("template")
PUBLISHED = {"_src_path": "gh:ollm-core/ollm-core", "_commit": f"v{__version__}"}
"""Where `copier update` finds this very template: the repository, and the tag of the release."""
OPTIONS: Mapping[str, str] = {
    "model_type": "The model_type in its config.json.  [default: FAMILY]",
    "class_name": "The name of the adapter's class.  [default: made from FAMILY]",
    "repo": "A hub repository of the family, OWNER/NAME.  [default: one of Mistral 7B]",
    "author": "Your name.",
    "license": "The license of the adapter.  [default: Apache-2.0]",
    "url": "The address of the adapter's own repository, if it has one already.",
}
"""By question of the template: what its option is for. FAMILY is an argument."""
CHOICES: Mapping[str, Sequence[str]] = {"license": ("Apache-2.0", "MIT")}
"""The questions that have some."""
_REFUSED = re.compile(r"Validation error for question '(\w+)': (.*)", re.DOTALL)

Command = TypeVar("Command", bound=Callable[..., object])


@click.group()
def adapter() -> None:
    """Write an adapter for a model family."""


def _options(command: Command) -> Command:
    """One option for each question."""
    for question, text in reversed(list(OPTIONS.items())):
        name = f"--{question.replace('_', '-')}"
        kind = click.Choice(CHOICES[question]) if question in CHOICES else click.STRING
        command = click.option(name, question, type=kind, help=text)(command)
    return command


@adapter.command()
@click.argument("family")
@_options
@click.option("--defaults", is_flag=True, help="Ask nothing: what no option says is the default.")
@click.option("--out", metavar="DIR", help="Where to make it.  [default: ./ollm-adapter-FAMILY]")
def new(family: str, defaults: bool, out: str | None, **options: str | None) -> None:
    """Make the project of an adapter for FAMILY, a name as in olmo2 or qwen3_next.

    It is a whole distribution: the adapter, its catalog, the conformance test, CI that tests and
    publishes, README, license. Asks what no option says; with --defaults, or where stdin is no
    terminal, it asks nothing.
    """
    directory = _absolute(out or f"ollm-adapter-{family.replace('_', '-')}")
    given = {name: answer for name, answer in options.items() if answer is not None}
    ask = not defaults and sys.stdin.isatty()
    # Only --out names a directory of its own: a FAMILY with a slash is refused as an answer.
    parent = directory.parent if out else _absolute(".")
    make_project(directory, {"family": family, **given}, parent=parent, ask=ask)
    name = shlex.quote(out or directory.name)
    click.echo(
        f"{name} is made, by the template of ollm-conformance {__version__}. Next:\n"
        f"    cd {name}\n"
        "    pip install -e '.[dev]'\n"
        "    pytest\n"
        "README.md there lists what to fill in."
    )


def _absolute(path: str) -> Path:
    """`path` from the root on, with `~` expanded and links as they are."""
    try:
        return Path(os.path.abspath(os.path.expanduser(path)))
    except FileNotFoundError as error:
        raise InputError(f"{path} is not a path: the current directory is gone") from error


def make_project(directory: Path, answers: Mapping[str, str], *, parent: Path, ask: bool) -> None:
    """Make the project `directory`, which must not be there or be empty. `answers` by question;
    the others are asked for if `ask`, else the template's defaults hold. `parent` holds the
    directory; what is made there under another name is moved when it is whole.

    Raises InputError for an answer that the template refuses, and for a directory in use.
    """
    try:
        _must_be_free(directory, parent)
        import copier  # slow, as is what it imports

        place = directory if directory.is_dir() else parent  # on the file system of `directory`
        with TemporaryDirectory(prefix=".ollm-adapter-", dir=place) as scratch:
            made = Path(scratch) / "project"
            copier.run_copy(
                str(TEMPLATE),
                made,
                data={**answers, "published": PUBLISHED},
                defaults=not ask,
                quiet=True,
            )
            if place is parent:
                made.rename(directory)
            else:
                for path in list(made.iterdir()):
                    path.rename(directory / path.name)
    except ValueError as error:
        raise _as_input_error(error, answers) from error
    except OSError as error:
        raise InputError(
            f"{directory} cannot be written: {error.strerror or error}",
            hint="choose another directory with --out",
        ) from error


def _must_be_free(directory: Path, parent: Path) -> None:
    hint = "choose another directory with --out"
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory", hint=hint)
    if directory.is_dir() and not directory.is_symlink():
        if any(directory.iterdir()):
            raise InputError(f"{directory} is there already and not empty", hint=hint)
    elif directory.exists() or directory.is_symlink():
        raise InputError(f"{directory} is there already and not a directory", hint=hint)


def _as_input_error(error: ValueError, answers: Mapping[str, str]) -> InputError:
    """copier's refusal of an answer, with the name that the answer has on the command line."""
    refused = _REFUSED.fullmatch(str(error))
    if refused is None:
        return InputError(f"the project cannot be made: {error}")
    question, reason = refused.groups()
    name = "FAMILY" if question == "family" else f"--{question.replace('_', '-')}"
    got = f" {answers[question]!a}" if question in answers else ""
    return InputError(f"{name}{got}: {reason}", hint="ollm adapter new --help")
