"""The verb `chat`: turns in the terminal, each going on from what was read before."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.conversation import Conversation
from ollm_core.cli.inputs import as_text_option
from ollm_core.cli.models import fetch_if
from ollm_core.cli.options import debug_option, keywords_of, options_of, user_path
from ollm_core.cli.output import print_error
from ollm_core.cli.sampling import sampling_of, sampling_options
from ollm_core.cli.signals import at_interrupt
from ollm_core.cli.streaming import ProgressBar, StreamedAnswer
from ollm_core.cli.waiting import wait_asleep_beside_others
from ollm_core.errors import OllmError

if TYPE_CHECKING:
    from ollm_core.generate.causal_lm import StreamedModel
    from ollm_core.serving.request import SamplingParams
    from ollm_core.serving.scheduler import Scheduler
    from ollm_core.text.answer_form import AnswerForm

_EXPECTED_TOKENS = 8192
_QUOTES = '"""'


@click.command(short_help="Talk with a model, turn by turn.")
@model_argument
@click.option(
    "--file",
    "files",
    metavar="FILE",
    type=user_path,
    multiple=True,
    help="A document that your first message is about. Give as many as you have.",
)
@as_text_option
@click.option("--system", metavar="TEXT", help="A system message for the chat template.")
@click.option("--pull", is_flag=True, help="Download MODEL first, if it is not on disk.")
@options_of("chat")
@sampling_options
@debug_option
def chat(
    model: str,
    files: tuple[Path, ...],
    as_text: bool,
    system: str | None,
    pull: bool,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Talk with MODEL: an id, a hub repository (owner/name), or a directory.

    Each turn goes on from what the model has read: only what is new is computed. /help lists what
    you can do; Ctrl-C stops an answer, Ctrl-D ends the chat. Nothing is kept on disk, unless you
    /save it, or give a --kv-dir.
    """
    sampling = sampling_of(options, max_new_tokens)
    talk = Conversation(system, as_text=as_text)
    for file in files:
        click.echo(talk.attach(file), err=True)
    fetch_if(model, options["models_dir"], pull)
    if not options["device"].startswith("cuda"):
        wait_asleep_beside_others()
    progress = ProgressBar(Path(model).name)
    try:
        from ollm_core.api import load

        loading = keywords_of("chat", options)
        with load(model, **loading, on_progress=progress) as opened:
            progress.close()
            with opened.open_scheduler(_EXPECTED_TOKENS) as scheduler:
                _talk(talk, opened, scheduler, sampling)
    finally:
        progress.close()


def _talk(
    talk: Conversation, opened: StreamedModel, scheduler: Scheduler, sampling: SamplingParams
) -> None:
    from ollm_core.text.prompts import PromptEncoder

    encoder = PromptEncoder(opened.tokenizer)
    if sys.stdin.isatty():
        click.echo("/help lists what you can do, Ctrl-D ends", err=True)
    for line in _lines():
        try:
            if line.startswith("/"):
                if told := talk.command(line):
                    click.echo(told, err=True)
                if talk.has_ended:
                    return
                continue
            talk.say(line)
            try:
                [prompt] = encoder.of_chats([talk.messages])
                text = _answer(opened, scheduler, prompt, encoder.answer_form(prompt), sampling)
            except BaseException:
                talk.take_back()
                raise
            talk.answered(text)
        except OllmError as error:
            print_error(error.message, error.hint)


def _answer(
    opened: StreamedModel,
    scheduler: Scheduler,
    prompt: Sequence[int],
    form: AnswerForm,
    sampling: SamplingParams,
) -> str:
    """Print the answer as it is made; -> its text, as far as it came, without what the model
    thought. Raises what it failed by.
    """
    from ollm_core.serving.offline import Answered
    from ollm_core.serving.request import Request
    from ollm_core.text.answer_form import Said

    progress = ProgressBar("")
    opened.on_progress(progress)
    wanted = sampling.showing(form.control_ids(opened.tokenizer))
    request = Request(token_ids=prompt, wanted=wanted)
    said, found = Said(form), Answered()
    shown = StreamedAnswer(progress, said, silent=False)
    try:
        with at_interrupt(lambda: scheduler.cancel(request.request_id)):
            scheduler.add(request)
            while not scheduler.is_idle:
                for event in scheduler.step():
                    shown.add(event)
                    found.add(event)
    finally:
        opened.on_progress(None)
        progress.close()
    if found.error is not None:
        raise found.error
    return said.text


class _DroppedError(Exception):
    """Ctrl-C at the prompt: what was typed is not wanted."""


def _lines() -> Iterator[str]:
    """What the user says, message by message, until stdin ends."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 # input() then edits, and knows earlier lines

    def drop() -> None:
        raise _DroppedError

    while True:
        try:
            with at_interrupt(drop):
                line = _message(is_terminal)
        except _DroppedError:
            click.echo("\nCtrl-D or /bye ends the chat", err=True)
            continue
        except EOFError:
            if is_terminal:
                click.echo(err=True)
            return
        if line.strip():
            yield line


def _message(is_terminal: bool) -> str:
    """A line, or lines between triple quotes. Raises EOFError."""
    line = input("> " if is_terminal else "")
    if not line.startswith(_QUOTES):
        return line
    parts = [line.removeprefix(_QUOTES)]
    while not parts[-1].rstrip().endswith(_QUOTES):
        parts.append(input(". " if is_terminal else ""))
    parts[-1] = parts[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(parts).strip("\n")
