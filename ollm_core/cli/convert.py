"""The verb `convert`: compresses the weights of a model, losslessly."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollm_core.cli.completion import model_argument
from ollm_core.cli.options import debug_option, json_option, options_of, user_path
from ollm_core.cli.output import print_json
from ollm_core.memory.sizes import format_size

if TYPE_CHECKING:
    from ollm_core.convert.compress import Converting


@click.command(short_help="Compress the bf16 weights of a model, losslessly.")
@model_argument
@click.option(
    "--out",
    metavar="DIR",
    required=True,
    type=user_path,
    help="Directory for the compressed model.",
)
@options_of("convert")
@json_option
@debug_option
def convert(model: str, out: Path, models_dir: str | None, as_json: bool) -> None:
    """Compress the bf16 weights of MODEL, an id or a directory, into a new model, losslessly.

    A run of the new model reads a third less from disk and works the CPU more: use it where the
    disk is slow. The original is not changed. After an interruption, run the command again: it
    writes the files that are missing.
    """
    from ollm_core.checkpoint.locate import resolve
    from ollm_core.convert.compress import convert
    from ollm_core.files.paths import check_writable_directory
    from ollm_core.plugins.registry import Registry

    registry = Registry.discover()
    directory = resolve(model, registry, models_dir)
    check_writable_directory(out)
    started = time.perf_counter()
    bar = _Bar()
    try:
        made = convert(directory, out, registry=registry, on_progress=bar)
    finally:
        bar.close()
    seconds = time.perf_counter() - started
    saved = made.original_bytes - made.stored_bytes
    if as_json:
        fields = asdict(made) | {"path": str(made.path), "saved_bytes": saved}
        print_json(fields | {"seconds": round(seconds, 3)})
        return
    click.echo(made.path)
    found = f", {made.num_found} of {made.num_files} files were there" if made.num_found else ""
    click.echo(
        f"{format_size(made.stored_bytes)} of {format_size(made.original_bytes)}, "
        f"{format_size(saved)} saved ({saved / made.original_bytes:.1%}); "
        f"{made.num_compressed} of {made.num_tensors} tensors compressed, all checked bit for bit, "
        f"in {seconds:.1f} s{found}",
        err=True,
    )


class _Bar:
    """Bytes, rate and time left, on stderr if that is a terminal."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc="converting",
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=None,
            leave=False,
            dynamic_ncols=True,
        )

    def __call__(self, progress: Converting) -> None:
        self._bar.total = progress.bytes_total
        self._bar.set_postfix_str(progress.file, refresh=False)
        self._bar.update(progress.bytes_done - self._bar.n)

    def close(self) -> None:
        self._bar.close()
