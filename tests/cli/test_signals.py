"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, the shell's exit code, nothing left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

import ollm
from ollm_core.cli.main import main
from ollm_core.cli.signals import ENDING, Ended, Signals
from ollm_core.contracts.closing import Closing

STARTED = (
    "import sys; from ollm import main; print('started', flush=True); sys.argv[0] = 'ollm'; main()"
)
WORDS = {
    signal.SIGINT: "error: interrupted",
    signal.SIGTERM: "error: terminated",
    signal.SIGHUP: "error: terminated",
}


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command `ollm`, before it has imported anything."""
    command = [sys.executable, "-c", STARTED, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout
    process.stdout.readline()
    return process


def run_for_long(model: Path, kv_dir: Path, *more: str) -> subprocess.Popen[str]:
    """Some seconds at least."""
    arguments = ["--raw", "--prompt", "5 6 7", "--device", "cpu", "--max-new-tokens", "4000"]
    return start("run", model, *arguments, "--kv", "disk", "--kv-dir", kv_dir, *more)


def check_end(process: subprocess.Popen[str], number: int, *, may_be_done: bool = False) -> None:
    """It has ended by the signal, quietly."""
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert "Exception" not in err
    if not may_be_done or process.returncode:
        assert process.returncode == 128 + number, err
        assert err.strip() == WORDS[signal.Signals(number)]


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.2, 0.5, 1.3, 2.6])
def test_a_run_is_interrupted(chat: Path, tmp_path: Path, seconds: float):
    """At moments from the first import to the last token; some of them twice."""
    with run_for_long(chat, tmp_path / "kv", "--no-keep-kv") as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        if int(seconds * 10) % 2:
            time.sleep(0.02)
            process.send_signal(signal.SIGINT)
        check_end(process, signal.SIGINT)
    assert not list(tmp_path.glob("kv/*"))


@pytest.mark.slow
def test_a_run_is_ended_at_any_moment(chat: Path, tmp_path: Path):
    """By any signals, from the first import to the end of the interpreter."""
    arguments = ["--raw", "--prompt", "5 6", "--device", "cpu", "--max-new-tokens", "5"]
    arguments += ["--kv", "disk", "--no-keep-kv", "--kv-dir", str(tmp_path / "kv")]
    began = time.monotonic()
    start("run", chat, *arguments).communicate(timeout=120)
    whole, chance = time.monotonic() - began, random.Random(5)
    for _ in range(6):
        with start("run", chat, *arguments) as process:
            time.sleep(chance.random() * whole)
            number = chance.choice(ENDING)
            process.send_signal(number)
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.1)
                process.send_signal(number)
            check_end(process, number, may_be_done=True)
        assert not list(tmp_path.glob("kv/*"))


@pytest.mark.parametrize("arguments", [["list-models"], ["--help"]])
def test_looking_around_is_interrupted(arguments: list[str]):
    """While it imports, prints or ends."""
    for seconds in (0.01, 0.05, 0.1, 0.2):
        with start(*arguments) as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
            check_end(process, signal.SIGINT, may_be_done=True)


@pytest.mark.parametrize(("number", "keep"), [(signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_what_is_kept_stays_and_all_else_goes(
    chat: Path, tmp_path: Path, capsys, number: int, keep: bool
):
    """A run that is terminated closes its model, as any other."""
    more = () if keep else ("--no-keep-kv",)
    with run_for_long(chat, tmp_path / "kv", *more) as process:
        assert process.stdout
        assert process.stdout.read(40)  # it is answering
        process.send_signal(number)
        check_end(process, number)
    with pytest.raises(SystemExit):
        main(["cache", "verify", "--kv-dir", str(tmp_path / "kv"), "--json"])
    found = json.loads(capsys.readouterr().out)["prefixes"]
    assert [one["wrong"] for one in found] == ([""] if keep else [])
    assert keep or not list(tmp_path.glob("kv/*"))


def test_a_library_leaves_signals_alone(tiny: Path):
    """Only the command line handles them, and only while it runs."""
    before = [signal.getsignal(number) for number in ENDING]
    hook = sys.unraisablehook
    with ollm.load(tiny, device="cpu"):
        assert [signal.getsignal(number) for number in ENDING] == before
    with Signals().handled():
        assert [signal.getsignal(number) for number in ENDING] != before
    assert [signal.getsignal(number) for number in ENDING] == before
    assert sys.unraisablehook is hook


def test_ignored_signals_stay_ignored():
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().handled():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def ended_within(signals: Signals, body) -> bool:
    """Whether `body` was broken off."""
    try:
        with signals.raising():
            body()
    except Ended:
        return True
    return False


@pytest.mark.parametrize("number", ENDING)
def test_one_end_is_enough(number: int):
    """The first signal raises; those that come while it is obeyed do not disturb."""
    signals = Signals()
    with signals.handled():

        def body() -> None:
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)
                signal.raise_signal(signal.SIGTERM)

        assert ended_within(signals, body)
        signal.raise_signal(number)
        assert (signals.received, signals.exit_code) == (number, 128 + number)


def test_a_signal_before_the_start_ends_it():
    """It is not forgotten."""
    signals = Signals()
    with signals.handled():
        signal.raise_signal(signal.SIGTERM)
        assert ended_within(signals, lambda: time.sleep(10))
    assert signals.word == "terminated"


class Door(Closing):
    """Takes a while to close."""

    closed = False

    def close(self) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.03)
        self.closed = True


@pytest.mark.parametrize("by", ["hand", "finalizer"])
def test_closing_is_not_broken_off(by: str):
    """What would stay half open is closed first; then the signal comes."""
    signals, door = Signals(), Door()

    def body() -> None:
        if by == "hand":
            door.close()
        else:
            weakref.finalize(door, Door.close, door)()
        time.sleep(10)

    with signals.handled():
        assert ended_within(signals, body)
    assert door.closed


def test_a_signal_in_a_callback_is_not_lost(capsys):
    """Python drops what is raised there, and says so with a traceback."""
    signals = Signals()

    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def body() -> None:
        Dropped()
        time.sleep(10)

    with signals.handled():
        assert ended_within(signals, body)
    assert capsys.readouterr().err == ""
