"""How tokens are chosen: the flags of verbs that make texts."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ollm_core.cli.options import is_flag
from ollm_core.cli.settings import Setting

if TYPE_CHECKING:
    from ollm_core.serving.request import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])

_NAMES = ("top_p", "top_k", "seed")
_TOP_P = "Sample among the most likely tokens that sum up to this probability.  [default: all]"
_TOP_K = "Sample among this many of the most likely tokens.  [default: all]"


def sampling_options(command: Command) -> Command:
    """`--temperature`, `--top-p`, `--top-k` and `--seed`."""
    for option in reversed(
        (
            click.option(
                "--temperature",
                cls=Setting,
                type=click.FloatRange(0),
                default=0.0,
                help="Sampling temperature; 0, the default, is greedy.",
            ),
            click.option(
                "--top-p",
                cls=Setting,
                default=None,
                type=click.FloatRange(0, 1, min_open=True),
                help=_TOP_P,
            ),
            click.option("--top-k", cls=Setting, default=None, type=click.IntRange(1), help=_TOP_K),
            click.option(
                "--seed", cls=Setting, default=None, type=int, help="Make sampling repeatable."
            ),
        )
    ):
        command = option(command)
    return command


def taken_sampling(options: MutableMapping[str, Any]) -> dict[str, Any]:
    """What was given of them, which `options` has no more. Raises UsageError for what only changes
    sampling where there is none.
    """
    temperature = options.pop("temperature")
    given = {name: options.pop(name) for name in _NAMES}
    stated = {name: value for name, value in given.items() if value is not None}
    if stated and not temperature:
        if names := [name for name in stated if is_flag(name)]:
            flags = ", ".join("--" + name.replace("_", "-") for name in names)
            raise click.UsageError(f"{flags} needs a --temperature above 0")
        return {"temperature": temperature}  # a variable or a file says it for other commands
    return {"temperature": temperature, **stated}


def sampling_of(options: MutableMapping[str, Any], max_new_tokens: int) -> SamplingParams:
    """The same, as what a request wants."""
    from ollm_core.serving.request import SamplingParams

    return SamplingParams(max_tokens=max_new_tokens, **taken_sampling(options))
