"""The `ollm` command: runs a verb, and shows errors as one line and a hint."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from ollm_core import __version__
from ollm_core.cli.ask import ask
from ollm_core.cli.batch import batch
from ollm_core.cli.cache import cache
from ollm_core.cli.chat import chat
from ollm_core.cli.completion import VARIABLE, completion
from ollm_core.cli.config import config
from ollm_core.cli.convert import convert
from ollm_core.cli.decide import decide
from ollm_core.cli.doctor import doctor
from ollm_core.cli.listing import list_models
from ollm_core.cli.models import import_, plugins, pull
from ollm_core.cli.offered import Verbs
from ollm_core.cli.options import debug_option
from ollm_core.cli.output import print_error, quiet
from ollm_core.cli.plan import plan
from ollm_core.cli.run import run
from ollm_core.cli.serve import serve
from ollm_core.cli.signals import Ended, Signals
from ollm_core.cli.streams import READER_GONE, flush, is_gone, open_missing, was_writing
from ollm_core.errors import DoesNotFitError, OllmError, one_line


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="ollm")
@debug_option
def cli() -> None:
    """Run large language models that do not fit in your memory: exact answers, a memory limit that
    holds, weights read from the SSD.

    Variables and files set options, too: see ollm config --help. Write sizes as 8GB or 512MiB. Exit
    codes: 0 done, 2 bad usage or input, 3 does not fit, 4 unknown model or plugin, 1 any other
    error. Errors go to stderr, with --json too.
    """


for _command in (
    run,
    chat,
    ask,
    decide,
    batch,
    serve,
    plan,
    pull,
    import_,
    convert,
    list_models,
    plugins,
    cache,
    doctor,
    config,
    completion,
):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `arguments` (default: those of the process) and exit with its code.

    Inside of it, SIGINT, SIGTERM and SIGHUP break the verb off, which then closes what it has open.
    """
    session, signals = {"debug": False}, Signals()
    with quiet(), signals.handled():
        try:
            open_missing()
            with signals.raising():
                code = _invoke(sys.argv[1:] if arguments is None else arguments, session)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:  # noqa: BLE001 # the last resort: no traceback for the user
            code = _tell(error, signals, debug=session["debug"])
        unwritten = flush()
        if unwritten and not code:
            code = _tell(unwritten, signals, debug=session["debug"])
    sys.exit(code or 0)


def _invoke(arguments: Sequence[str], session: dict[str, bool]) -> Any:
    if VARIABLE in os.environ:  # a shell asks
        cli.main(list(arguments), prog_name="ollm")
    try:
        with cli.make_context("ollm", list(arguments), obj=session) as context:
            return cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code


def _tell(error: BaseException, signals: Signals, *, debug: bool) -> int:
    """Show an error on stderr as people want it; -> the exit code."""
    if signals.received or isinstance(error, (click.Abort, KeyboardInterrupt)):
        if sys.stderr.isatty():
            click.echo(err=True)  # the terminal has shown ^C on this line
        print_error(signals.word, error.hint if isinstance(error, Ended) else "")
        return signals.exit_code
    if is_gone(error):
        return READER_GONE
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, click.UsageError):
        print_error(
            error.format_message(), f"{error.ctx.command_path if error.ctx else 'ollm'} --help"
        )
        return error.exit_code
    if isinstance(error, click.ClickException):
        print_error(error.format_message())
        return error.exit_code
    told = _as_told(error)
    print_error(told.message, told.hint)
    if debug:
        traceback.print_exception(error)
    return told.exit_code


def _as_told(error: BaseException) -> OllmError:
    """Errors that nobody raised on purpose are told by what they are."""
    if isinstance(error, OllmError):
        return error
    if _is_out_of_memory(error):
        return DoesNotFitError(
            f"out of memory: {one_line(error)}",
            hint="end other programs, or allow less by --device-memory and --host-memory",
        )
    if isinstance(error, OSError) and was_writing(error):
        return OllmError(f"cannot write to stdout: {error.strerror}")
    return OllmError(f"{type(error).__name__}: {error}", hint="--debug shows where it happened")


def _is_out_of_memory(error: BaseException) -> bool:
    """By Python, by the system, or by torch, which has a class of its own on a GPU only."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


if __name__ == "__main__":
    main()
