"""The verb `ask`: answers many questions on one document, which is read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.documents import document_options, read_all
from ollm_core.cli.forecast import forecast
from ollm_core.cli.models import fetch_if
from ollm_core.cli.options import debug_option, json_option, keywords_of, options_of, user_path
from ollm_core.cli.output import print_json
from ollm_core.cli.report import summary
from ollm_core.cli.sampling import sampling_of, sampling_options
from ollm_core.cli.signals import Ended
from ollm_core.cli.streaming import ProgressBar, StreamedAnswer
from ollm_core.cli.waiting import wait_asleep_beside_others
from ollm_core.errors import InputError


@click.command(short_help="Answer many questions on one document.")
@model_argument
@document_options
@click.option(
    "-q",
    "--question",
    "questions",
    metavar="TEXT",
    multiple=True,
    help="A question on the document. Give as many as you have.",
)
@click.option(
    "--questions",
    "question_file",
    metavar="FILE",
    type=user_path,
    help="A text file with a question on each line.",
)
@click.option("--system", metavar="TEXT", help="A system message for the chat template.")
@click.option("--pull", is_flag=True, help="Download MODEL first, if it is not on disk.")
@click.option(
    "--map-reduce",
    is_flag=True,
    help="If the document is past the model's positions, ask of its parts, then of the answers.",
)
@options_of("ask")
@sampling_options
@json_option
@debug_option
def ask(
    model: str,
    files: tuple[Path, ...],
    as_text: bool,
    questions: tuple[str, ...],
    question_file: Path | None,
    system: str | None,
    pull: bool,
    map_reduce: bool,
    as_json: bool,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Answer questions on documents with MODEL: an id, a hub repository (owner/name), or a
    directory.

    The documents are read once; all answers are then made together. They go to stdout, each below
    its question; progress and a summary go to stderr.
    """
    sampling = sampling_of(options, max_new_tokens)
    asked = [*questions, *_lines(question_file)]
    if not asked:
        raise click.UsageError("there is no question: give -q, or --questions FILE")
    document = read_all(files, as_text=as_text)
    fetch_if(model, options["models_dir"], pull)
    if not options["device"].startswith("cuda"):
        wait_asleep_beside_others()
    progress = ProgressBar(Path(model).name)
    answers = _Answers(
        asked,
        len(files),
        progress,
        lambda num_tokens, num_kept: forecast(model, options, num_tokens, max_new_tokens, num_kept),
        silent=as_json,
    )
    try:
        from ollm_core.api import load

        loading = keywords_of("ask", options)
        with load(model, **loading, on_progress=progress) as opened:
            answers.open(opened.tokenizer, system)
            start = time.perf_counter()
            found = opened.ask(
                document,
                asked,
                sampling,
                system=system,
                map_reduce=map_reduce,
                on_prompts=answers.begin,
                on_kept=answers.kept,
                on_event=answers.add,
            )
            seconds = time.perf_counter() - start
            stats = opened.stats
    except Ended as ended:
        ended.hint = progress.saved
        raise
    finally:
        progress.close()
    answers.finish(found)
    if as_json:
        print_json(_report(asked, found, seconds, stats))
    else:
        layers = options["device_layers"], options["host_layers"]
        click.echo("\n" + summary(stats, *layers), err=True)


class _Answers:
    """Prints each answer when it is complete. A single one is printed as it is made."""

    def __init__(
        self,
        questions: Sequence[str],
        num_files: int,
        progress: ProgressBar,
        expected: Callable[[int, int], str],
        *,
        silent: bool,
    ) -> None:
        """`expected` says how long a prompt of so many tokens will take, of which so many are
        kept.
        """
        self._expected = expected
        self._questions = questions
        self._num_files = num_files
        self._progress = progress
        self._silent = silent
        self._num_tokens = 0
        self._streamed: StreamedAnswer | None = None

    def open(self, tokenizer: Any, system: str | None) -> None:
        """Get ready for how the model writes its answers. Raises InputError, ConfigError."""
        from ollm_core.text.answer_form import Said
        from ollm_core.text.prompts import PromptEncoder

        if len(self._questions) > 1 or self._silent:
            return
        encoder = PromptEncoder(tokenizer, system)
        [prompt] = encoder.of_texts(self._questions)
        said = Said(encoder.answer_form(prompt))
        self._streamed = StreamedAnswer(self._progress, said, silent=False)

    def begin(self, num_tokens: int, num_parts: int) -> None:
        """How long the longest prompt is, and how many parts the document is read in."""
        self._num_tokens = num_tokens
        if self._silent:
            return
        documents = "1 document" if self._num_files == 1 else f"{self._num_files} documents"
        number = len(self._questions)
        questions = "1 question" if number == 1 else f"{number} questions"
        parts = f", read in {num_parts} parts" if num_parts > 1 else ""
        self._progress.line(f"{num_tokens:,} tokens with {documents}, {questions}{parts}")

    def kept(self, num_tokens: int) -> None:
        """So many tokens of the longest prompt were read before."""
        if self._silent:
            return
        if num_tokens:
            self._progress.line(f"{num_tokens:,} of them are kept")
        if expected := self._expected(self._num_tokens, num_tokens):
            self._progress.line(expected)

    def add(self, event: Any) -> None:
        """Called with what happens."""
        if self._streamed:
            self._streamed.add(event)

    def finish(self, found: Sequence[Any]) -> None:
        """All are complete."""
        if self._silent or self._streamed:
            return
        for question, answer in zip(self._questions, found, strict=True):
            click.echo(f"## {question}\n\n{answer.text.strip()}\n")


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    from ollm_core.cli.inputs import read_text

    lines = [line.strip() for line in read_text(file, as_text=True).splitlines()]
    if not any(lines):
        raise InputError(f"{file}: no line with a question")
    return [line for line in lines if line]


def _report(
    questions: Sequence[str], found: Sequence[Any], seconds: float, stats: Any
) -> dict[str, object]:
    return {
        "answers": [
            {
                "question": question,
                "text": answer.text,
                **({"reasoning": answer.thoughts} if answer.thoughts else {}),
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "num_prompt_tokens": answer.counts.num_prompt_tokens,
            }
            for question, answer in zip(questions, found, strict=True)
        ],
        "num_cached_tokens": stats.cached_tokens,
        "seconds": seconds,
        "prefill_tokens": stats.prefill_tokens,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        **stats.for_json(drafting=False),
    }
