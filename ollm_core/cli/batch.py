"""The verb `batch`: answers the rows of a file, and goes on where a run before has ended."""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.models import check_known
from ollm_core.cli.options import debug_option, json_option, keywords_of, options_of, user_path
from ollm_core.cli.output import print_json
from ollm_core.cli.report import summary
from ollm_core.cli.signals import Ended
from ollm_core.cli.streaming import ProgressBar
from ollm_core.cli.waiting import wait_asleep_beside_others

if TYPE_CHECKING:
    from ollm_core.contracts.progress import Progress
    from ollm_core.serving.jobs.job import BatchJob, BatchProgress
    from ollm_core.serving.jobs.settings import Settings

_SETTINGS = ("dtype", "precision", "attention", "max_new_tokens", "trust_remote_code")
"""Options that can change an answer."""
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} rows, {elapsed}<{remaining}{postfix}"
_SHOWN_SECONDS = 0.1


@click.command(short_help="Answer the rows of a file.")
@model_argument
@click.argument("rows", metavar="IN.jsonl", type=user_path)
@click.argument("output", metavar="OUT.jsonl", type=user_path)
@click.option(
    "--errors",
    metavar="FILE",
    type=user_path,
    help="Where rows that cannot be answered are told.  [default: OUT.errors.jsonl]",
)
@click.option(
    "--anyway",
    is_flag=True,
    help="Go on with OUT.jsonl though it was begun with other settings or rows.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Answer on a Ray cluster: host:port, ray://host:port, auto, or local.",
)
@click.option(
    "--ray-workers",
    type=click.IntRange(1),
    help="Models that are opened on the cluster.  [default: one for each node]",
)
@options_of("batch")
@json_option
@debug_option
def batch(
    model: str,
    rows: Path,
    output: Path,
    errors: Path | None,
    anyway: bool,
    address: str | None,
    ray_workers: int | None,
    as_json: bool,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Answer the rows of IN.jsonl with MODEL, many at once: OpenAI's batch lines.

    Each answer is appended to OUT.jsonl as it is ready, in OpenAI's form, and is safe on the disk.
    After a crash or Ctrl-C the same command goes on with the rows that are left. Rows that say no
    max_tokens get --max-new-tokens.
    """
    if ray_workers and not address:
        raise click.UsageError("--ray-workers needs --ray ADDRESS")
    check_known(model, options["models_dir"], here=True)
    if not address and not options["device"].startswith("cuda"):
        wait_asleep_beside_others()
    from ollm_core.checkpoint.locate import resolve
    from ollm_core.plugins.registry import Registry
    from ollm_core.serving.jobs.job import BatchJob
    from ollm_core.serving.jobs.settings import model_sample

    chosen = {**options, "max_new_tokens": max_new_tokens}
    directory = resolve(model, Registry.discover(), options["models_dir"])
    settings: Settings = {
        "model": model_sample(directory),
        **{name: chosen[name] for name in _SETTINGS},
    }
    try:
        with BatchJob(rows, output, errors, settings=settings, anyway=anyway) as job:
            stats = ""
            if job.progress.num_left and address:
                _run_on_ray(job, model, max_new_tokens, options, address, ray_workers)
            elif job.progress.num_left:
                stats = _run(job, model, max_new_tokens, options)
            _report(job, stats, as_json=as_json)
    except Ended as ended:
        ended.hint = "the same command goes on with the rows that are left"
        raise


def _run(job: BatchJob, model: str, max_new_tokens: int, options: dict[str, Any]) -> str:
    """Answer what is left; -> what it cost, for people."""
    from ollm_core.api import load
    from ollm_core.serving.openai.requests import Defaults

    name = Path(model).name if os.path.isdir(model) else model
    opening = ProgressBar(Path(model).name)
    loading = keywords_of("batch", options)
    try:
        with load(model, **loading, on_progress=opening) as opened:
            opening.close()
            bar = RowsBar(job.progress)
            opened.on_progress(bar.on_pass)
            try:
                defaults = Defaults(max_tokens=max_new_tokens)
                job.run(opened, name, defaults, bar)
            finally:
                bar.close()
            asked = options["device_layers"], options["host_layers"]
            return summary(opened.stats, *asked)
    finally:
        opening.close()


def _run_on_ray(
    job: BatchJob,
    model: str,
    max_new_tokens: int,
    options: dict[str, Any],
    address: str,
    num_workers: int | None,
) -> None:
    """The same on the workers of a Ray cluster, which find the model under the same name."""
    from ollm_core.api import load
    from ollm_core.serving.jobs.cluster import Cluster
    from ollm_core.serving.openai.requests import Defaults

    is_directory = os.path.isdir(model)
    path = str(Path(model).absolute()) if is_directory else model
    loading = keywords_of("batch", options)
    how: dict[str, Any] = {
        "open_model": functools.partial(load, path, **loading),
        "name": Path(model).name if is_directory else model,
        "defaults": Defaults(max_tokens=max_new_tokens),
        "num_gpus": int(options["device"].startswith("cuda")),
    }
    bar = RowsBar(job.progress)
    cluster = Cluster(address, num_workers)
    try:
        job.run_by(lambda rows, tell: cluster.answer(rows, tell, **how), bar, counts_tokens=True)
    finally:
        bar.close()
        cluster.close()


class RowsBar:
    """Rows, tokens per second and the time that is left, on stderr if that is a terminal."""

    def __init__(self, progress: BatchProgress) -> None:
        from tqdm import tqdm

        self._told = progress
        self._pass = ""
        self._shown = 0.0
        self._bar = tqdm(
            desc="batch",
            bar_format=_BAR,
            total=progress.num_rows,
            initial=progress.num_found,
            file=sys.stderr,
            disable=None,  # off unless stderr is a terminal
            leave=False,
            dynamic_ncols=True,
            smoothing=0,  # rows end in groups
        )

    def __call__(self, progress: BatchProgress) -> None:
        """How far the batch is."""
        self._told = progress
        self._bar.n = progress.num_rows - progress.num_left
        self._show()

    def on_pass(self, progress: Progress) -> None:
        """How far a weight pass is: of a large model one may take minutes."""
        self._pass = f", pass over {progress.num_new_tokens} tokens"
        self._pass += f" {progress.steps_done / max(progress.steps_total, 1):.0%}"
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar.disable or now - self._shown < _SHOWN_SECONDS:
            return
        self._shown = now
        tokens = _rate(self._told.num_new_tokens, self._told.seconds)
        failed = f", {self._told.num_failed} failed" if self._told.num_failed else ""
        self._bar.set_postfix_str(f"{tokens:.1f} tokens/s{failed}{self._pass}", False)
        self._bar.refresh()

    def close(self) -> None:
        """Take it off the screen. May be called twice."""
        self._bar.close()


def _report(job: BatchJob, stats: str, *, as_json: bool) -> None:
    told = job.progress
    if as_json:
        print_json(
            {
                "output": str(job.output),
                "errors": str(job.errors) if job.has_errors else None,
                "num_rows": told.num_rows,
                "num_found": told.num_found,
                "num_answered": told.num_answered,
                "num_failed": told.num_failed,
                "num_prompt_tokens": told.num_prompt_tokens,
                "num_cached_tokens": told.num_cached_tokens,
                "num_new_tokens": told.num_new_tokens,
                "seconds": told.seconds,
                "new_tokens_per_second": _rate(told.num_new_tokens, told.seconds),
            }
        )
        return
    before = f", {told.num_found} by runs before" if told.num_found else ""
    lines = {
        "rows": f"{told.num_answered} answered, {told.num_failed} failed{before}",
        "tokens": f"{told.num_prompt_tokens} of prompts, {told.num_cached_tokens} of them shared; "
        f"{told.num_new_tokens} new in {told.seconds:.1f} s, "
        f"{_rate(told.num_new_tokens, told.seconds):.1f} tokens/s",
        "output": str(job.output),
    }
    if job.has_errors:
        lines["errors"] = str(job.errors)
    shown = "\n".join(f"{name:<14}{value}" for name, value in lines.items())
    click.echo("\n".join(part for part in (stats, shown) if part), err=True)


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
