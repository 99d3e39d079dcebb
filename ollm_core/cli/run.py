"""The verb `run`: answers one prompt, and reports the time and memory it took."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.inputs import as_text_option, read_text
from ollm_core.cli.models import fetch_if
from ollm_core.cli.options import (
    STDIN,
    debug_option,
    json_option,
    keywords_of,
    options_of,
    user_path,
)
from ollm_core.cli.output import print_json
from ollm_core.cli.profile import profile_table
from ollm_core.cli.refused import what_would_do
from ollm_core.cli.report import json_report, summary
from ollm_core.cli.sampling import sampling_of, sampling_options
from ollm_core.cli.signals import Ended
from ollm_core.cli.streaming import ProgressBar, StreamedAnswer
from ollm_core.cli.waiting import wait_asleep_beside_others
from ollm_core.errors import DoesNotFitError, InputError
from ollm_core.files.paths import check_writable_file

if TYPE_CHECKING:
    from ollm_core.text.prompts import PromptEncoder


@click.command(short_help="Answer a prompt with a model.")
@model_argument
@click.option("--prompt", metavar="TEXT", help="Your prompt. Without --prompt and --file, stdin.")
@click.option(
    "--file",
    metavar="FILE",
    type=user_path,
    help="A document that the model reads before the prompt: text, Markdown, HTML, PDF or DOCX; "
    "- is stdin.",
)
@as_text_option
@click.option("--system", metavar="TEXT", help="A system message for the chat template.")
@click.option(
    "--reasoning-effort",
    type=click.Choice(["low", "medium", "high"]),
    help="How long the model thinks, if its chat template can say.  [default: the template's]",
)
@click.option("--pull", is_flag=True, help="Download MODEL first, if it is not on disk.")
@click.option("--raw", is_flag=True, help="Continue your text as it is, without a chat template.")
@click.option(
    "--allow-special-tokens",
    is_flag=True,
    help="Let your text contain control tokens, as <|im_end|>.  [default: they are plain text]",
)
@options_of("run")
@sampling_options
@click.option(
    "--profile",
    metavar="FILE",
    type=user_path,
    help="Print where the time went, and write a trace for ui.perfetto.dev to FILE.",
)
@json_option
@debug_option
def run(
    model: str,
    prompt: str | None,
    file: Path | None,
    as_text: bool,
    system: str | None,
    reasoning_effort: str | None,
    pull: bool,
    raw: bool,
    allow_special_tokens: bool,
    as_json: bool,
    max_new_tokens: int,
    profile: Path | None,
    **options: Any,
) -> None:
    """Answer a prompt with MODEL: an id, a hub repository (owner/name), or a directory.

    With --file and --prompt, the model reads the document and then the question. The answer goes
    to stdout as it is made, progress and a summary to stderr.
    """
    if raw and system:
        raise click.UsageError("--system needs a chat template, and --raw goes without")
    if raw and reasoning_effort:
        raise click.UsageError("--reasoning-effort needs a chat template, and --raw goes without")
    sampling = sampling_of(options, max_new_tokens)
    if options["num_draft_tokens"] and options["draft"] == "none":
        raise click.UsageError("--num-draft-tokens needs --draft")
    if profile:
        check_writable_file(profile)
    text = _user_text(prompt, file, as_text)
    drafting = options["draft"] != "none"
    fetch_if(model, options["models_dir"], pull)
    if not options["device"].startswith("cuda"):
        wait_asleep_beside_others()
    progress = ProgressBar(Path(model).name)
    prompt_ids: list[int] = []
    try:
        from ollm_core.api import load
        from ollm_core.profiling import Profile
        from ollm_core.serving.request import Request
        from ollm_core.text.answer_form import Said

        measured = Profile() if profile else None
        loading = keywords_of("run", options)
        with load(model, **loading, on_progress=progress, profile=measured) as opened:
            encoder = _encoder(
                opened.tokenizer, system, raw, reasoning_effort, allow_special_tokens
            )
            [prompt_ids] = encoder.of_texts([text])
            form = encoder.answer_form(prompt_ids)
            sampling = sampling.showing(form.control_ids(opened.tokenizer))
            said = Said(form)
            answer = StreamedAnswer(progress, said, silent=as_json)
            start = time.perf_counter()
            [[found]] = opened.answer(
                [Request(token_ids=prompt_ids, wanted=sampling)], on_event=answer.add
            )
            seconds = time.perf_counter() - start
            stats = opened.stats
    except Ended as ended:
        ended.hint = progress.saved
        raise
    except DoesNotFitError as error:
        # It names what is missing at that moment; of a draft model a plan knows nothing.
        if error.memory and prompt_ids and options["draft"] != "model":
            num_tokens = len(prompt_ids)
            error.hint = what_would_do(model, options, num_tokens, max_new_tokens) or error.hint
        raise
    finally:
        progress.close()
    if profile and measured:
        measured.write(profile)
    if as_json:
        print_json(json_report(said, found.token_ids, len(prompt_ids), stats, drafting))
    else:
        asked = options["device_layers"], options["host_layers"]
        click.echo("\n" + summary(stats, *asked, drafting=drafting), err=True)
    if measured is not None:
        click.echo("\n" + profile_table(measured, seconds, stats), err=True)


def _user_text(prompt: str | None, file: Path | None, as_text: bool) -> str:
    """The document, then the prompt. Raises InputError if there is nothing to read."""
    parts = [read_text(file, as_text=as_text)] if file else []
    if prompt is not None:
        parts.append(prompt)
    if not parts and not sys.stdin.isatty():
        parts.append(read_text(Path(STDIN), as_text=as_text))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise InputError("the prompt is empty", hint="give --prompt, --file or stdin")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not UTF-8 text") from error
    return text


def _encoder(
    tokenizer: Any,
    system: str | None,
    raw: bool,
    reasoning_effort: str | None,
    allow_special_tokens: bool,
) -> PromptEncoder:
    from ollm_core.text.prompts import PromptEncoder

    options = {"reasoning_effort": reasoning_effort} if reasoning_effort else None
    how = {"raw": raw, "allow_special_tokens": allow_special_tokens}
    return PromptEncoder(tokenizer, system, options, **how)
