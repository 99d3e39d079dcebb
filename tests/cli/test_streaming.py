"""What a terminal shows while a model works."""

from __future__ import annotations

import io
import sys

import pytest

from ollm_core.cli.streaming import ProgressBar
from ollm_core.contracts.progress import Progress


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_each_stage(monkeypatch: pytest.MonkeyPatch, terminal: bool):
    """The check of the files and then the prefill, each with its part done, rate and time left, on
    a terminal only; the first decoded token takes it off the screen.
    """
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = ProgressBar("tiny")
    shown = []
    for progress in (
        Progress("check", 0, 8_000_000, 0, 0, 0),
        Progress("check", 2_000_000, 8_000_000, 0, 0, 2_000_000),
        Progress("prefill", 0, 4, 300, 0, 0),
        Progress("prefill", 2, 4, 300, 0, 1_000_000),
        Progress("decode", 0, 4, 1, 1, 2_000_000),
    ):
        bar(progress)
        if not bar._bar.disable:
            shown.append(str(bar._bar))
    if not terminal:
        assert screen.getvalue() == ""
        return
    assert "checking weights" in shown[1]
    assert " 25%" in shown[1]
    assert "B/s" in shown[1]
    assert "prefill 300 tokens   0%" in shown[2]
    assert " 50%" in shown[3]
    first = next(frame for frame in screen.getvalue().split("\r") if "prefill" in frame)
    assert "B/s" not in first  # that of the check
    assert screen.getvalue().endswith("\r")


def test_it_says_that_it_goes_on_and_how_the_next_run_would(capsys):
    """Once, also where there is no terminal; the other is for whoever breaks it off."""
    bar = ProgressBar("model")
    bar(Progress("prefill", 0, 96, 3000, 0, 0, num_layers=32))
    assert bar.saved == ""
    for steps_done, saved in ((48, 16), (49, 16), (51, 17)):
        bar(Progress("prefill", steps_done, 96, 3000, 0, 0, 0, 32, 16, saved))
    assert bar.saved == "the same command goes on from layer 18 of 32"
    bar(Progress("prefill", 96, 97, 3000, 0, 0, 0, 32, 16, 32))
    assert bar.saved == "the same command goes on from the last layer"
    bar(Progress("decode", 0, 97, 1, 1, 0, num_layers=32))
    assert bar.saved == ""
    bar.close()
    assert capsys.readouterr().err == "going on from layer 17 of 32\n"
