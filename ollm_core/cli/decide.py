"""The verb `decide`: typed questions on a document, answered as probabilities."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.documents import document_options, read_all
from ollm_core.cli.inputs import read_text
from ollm_core.cli.models import fetch_if
from ollm_core.cli.options import debug_option, json_option, keywords_of, options_of, user_path
from ollm_core.cli.output import print_json
from ollm_core.cli.report import summary
from ollm_core.cli.streaming import ProgressBar
from ollm_core.cli.waiting import wait_asleep_beside_others
from ollm_core.errors import InputError
from ollm_core.files.untrusted_json import parse_object

_BAR = 24  # characters of a probability of 1


@click.command(short_help="Answer typed questions on a document as probabilities.")
@model_argument
@document_options
@click.argument("questions", metavar="QUESTIONS.json", type=user_path)
@click.option("--pull", is_flag=True, help="Download MODEL first, if it is not on disk.")
@options_of("decide")
@json_option
@debug_option
def decide(
    model: str,
    files: tuple[Path, ...],
    as_text: bool,
    questions: Path,
    pull: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer typed questions on documents with MODEL as probabilities, without writing a text.

    QUESTIONS.json has the questions by name, for example:

    \b
    {"spam": {"type": "yes_no", "instructions": "Is this spam?"},
     "tone": {"type": "choice", "instructions": "What is the tone?",
              "criteria": {"calm": null, "angry": "Shouts, or threatens"}},
     "urgency": {"type": "score", "instructions": "How urgent is it?",
                 "criteria": ["Can wait", "This week", "Today"]}}

    The documents are read in one weight pass, all questions in another.
    """
    try:
        asked = parse_object(read_text(questions, as_text=True).encode())
    except ValueError as error:
        raise InputError(f"{questions}: {error}") from error
    if isinstance(asked.get("questions"), dict):  # transformers' whole request
        if asked.get("state") is not None:
            raise InputError(
                f"{questions} has a state of its own", hint="leave it out: --file is what is read"
            )
        asked = asked["questions"]
    document = read_all(files, as_text=as_text)
    fetch_if(model, options["models_dir"], pull)
    if not options["device"].startswith("cuda"):
        wait_asleep_beside_others()
    progress = ProgressBar(Path(model).name)
    try:
        from ollm_core.api import load

        loading = keywords_of("decide", options)
        with load(model, **loading, on_progress=progress) as opened:
            start = time.perf_counter()
            answers = opened.decide(document, asked)
            seconds = time.perf_counter() - start
            stats = opened.stats
    finally:
        progress.close()
    if as_json:
        print_json({"answers": answers, "seconds": seconds, **stats.for_json(drafting=False)})
        return
    for name, answer in answers.items():
        click.echo(_shown(name, answer))
    layers = options["device_layers"], options["host_layers"]
    click.echo("\n" + summary(stats, *layers), err=True)


def _shown(name: str, answer: dict[str, Any]) -> str:
    """A question's name, its answer, and a bar for each option."""
    kind = answer["type"]
    if kind == "noul":
        likely = {"yes": answer["noul"], "no": 1 - answer["noul"]}
        said = "yes" if answer["noul"] >= 0.5 else "no"
    elif kind == "choice":
        likely, said = answer["probabilities"], answer["choice"]
    else:
        legend = answer["legend"]
        likely = {f"{key} {legend[key]}": value for key, value in answer["probabilities"].items()}
        said = f"{answer['score']:.2f} of {len(likely) - 1}"
    width = max(map(len, likely))
    rows = (
        f"  {option:<{width}}  {'█' * round(value * _BAR):<{_BAR}}  {value:.3f}"
        for option, value in likely.items()
    )
    return "\n".join([f"{name}: {said}", *rows])
