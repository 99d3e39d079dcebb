"""The `ollm` command: its verbs, and what the user sees when one fails."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from ollm_core import __version__
from ollm_core.cli.cache import cache
from ollm_core.cli.convert import convert
from ollm_core.cli.doctor import doctor
from ollm_core.cli.models import import_, list_models, plugins, pull
from ollm_core.cli.offered import Verbs
from ollm_core.cli.output import debug_option, print_error, quiet
from ollm_core.cli.plan import plan
from ollm_core.cli.run import run
from ollm_core.errors import OllmError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it."""


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="ollm")
@debug_option
def cli() -> None:
    """Run large language models exactly, in a bounded memory, with weights from the SSD.

    Sizes are written 8GB or 512MiB. Exit codes: 0 done, 2 bad usage or input, 3 does not fit, 4
    unknown model or plugin, 1 anything else. Errors go to stderr, also with --json.
    """


for _command in (run, plan, pull, import_, convert, list_models, plugins, cache, doctor):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `arguments` (default: those of the process) and exit with its code."""
    session = {"debug": False}
    with quiet():
        try:
            code = cli.main(arguments, prog_name="ollm", standalone_mode=False, obj=session)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.UsageError as error:
            hint = f"{error.ctx.command_path} --help" if error.ctx else "ollm --help"
            print_error(error.format_message(), hint)
            code = error.exit_code
        except click.ClickException as error:
            print_error(error.format_message())
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            print_error("interrupted")
            code = INTERRUPTED
        except OllmError as error:
            print_error(error.message, error.hint)
            code = error.exit_code
            _trace(session["debug"])
        except Exception as error:  # noqa: BLE001 # the last resort: no traceback for the user
            print_error(f"{type(error).__name__}: {error}", "--debug shows where it happened")
            code = 1
            _trace(session["debug"])
    sys.exit(code or 0)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


if __name__ == "__main__":
    main()
