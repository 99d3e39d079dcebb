"""Shows progress in a terminal: a bar while the prompt is read, then the text as it is made."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ollm_core.contracts.progress import Progress
from ollm_core.memory.sizes import format_size
from ollm_core.serving.request import Event, Finished, NewToken
from ollm_core.text.thoughts import Thought

if TYPE_CHECKING:
    from ollm_core.text.answer_form import Said
    from ollm_core.text.tool_calls import Piece

_BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
_LOADING = "{desc} {elapsed}"


class ProgressBar:
    """Loading, then the check of the model's files, if there is one, and the prefill, with rate and
    time left, on stderr if that is a terminal.

    Call it with each `Progress`. It takes itself off the screen at the first decode step, or by
    `close`, so that the text after it stands alone.
    """

    def __init__(self, model: str) -> None:
        """`model` is the name to show while nothing has been computed."""
        from tqdm import tqdm

        self.saved = ""
        """How the next run goes on if this one is broken off now, for people; empty if not."""
        self._stage = ""
        self._start = 0.0, 0
        self._resumed = 0
        self._bar = tqdm(
            desc=f"opening {model}",
            bar_format=_LOADING,
            file=sys.stderr,
            disable=None,  # off unless stderr is a terminal
            leave=False,
            dynamic_ncols=True,
        )

    def __call__(self, progress: Progress) -> None:
        done, of = progress.saved_layers, progress.num_layers
        self.saved = f"the same command goes on from {_layer(done, of)}" if done else ""
        if progress.resumed_layers and not self._resumed:
            self.line(f"going on from {_layer(progress.resumed_layers, of)}")
        self._resumed = progress.resumed_layers
        if self._bar.disable:
            return
        if progress.stage == "decode":
            self.close()
            return
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._start = progress.stage, (now, progress.weight_bytes_read)
            what = f"prefill {progress.num_new_tokens} tokens"
            if progress.stage == "check":
                what = "checking weights"
            self._bar.bar_format = _BAR
            self._bar.set_description_str(what, False)
            self._bar.set_postfix_str("", False)
            self._bar.reset(progress.steps_total)
        seconds = now - self._start[0]
        if seconds > 0:
            rate = (progress.weight_bytes_read - self._start[1]) / seconds
            short = ""
            if progress.given_up_bytes:
                short = f", memory is short: {format_size(progress.given_up_bytes)} not kept"
            self._bar.set_postfix_str(f"{format_size(rate)}/s{short}", False)
        self._bar.update(progress.steps_done - self._bar.n)

    def line(self, text: str) -> None:
        """A line on stderr that stays, above the bar."""
        self._bar.clear()
        click.echo(text, err=True)
        self._bar.refresh()

    def close(self) -> None:
        """Take the bar off the screen. May be called twice."""
        self._bar.close()


def _layer(num_done: int, num_layers: int) -> str:
    return f"layer {num_done + 1} of {num_layers}" if num_done < num_layers else "the last layer"


class StreamedAnswer:
    """Writes an answer to stdout as soon as its characters are whole; what the model thinks before
    it, dimmed, to stderr.
    """

    def __init__(self, progress: ProgressBar, said: Said, *, silent: bool) -> None:
        """`said` takes the answer apart, and has what came so far."""
        self._progress = progress
        self._said = said
        self._silent = silent
        self._thinks = False

    def add(self, event: Event) -> None:
        """Called with what happens to its request."""
        if isinstance(event, NewToken):
            self._progress.close()
            self._write(self._said.add(event.text))
        elif isinstance(event, Finished):
            self._write([*self._said.add(event.text, last=True), "\n"])

    def _write(self, pieces: Sequence[Piece]) -> None:
        if self._silent:
            return
        for piece in pieces:
            if isinstance(piece, Thought):
                click.secho(piece.text, nl=False, err=True, dim=True)
            elif isinstance(piece, str):
                if self._thinks:
                    click.echo("\n", err=True)
                click.echo(piece, nl=False)
                sys.stdout.flush()
            self._thinks = isinstance(piece, Thought)
