"""Standard streams that are full, closed, or without a reader: one line at most, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ollm_core.cli.main import main


def outcome(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a command line in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0), capsys.readouterr().err


@pytest.fixture
def model_commands(chat: Path) -> list[list[object]]:
    """Commands that print in several ways."""
    run = ["run", chat, "--prompt", "5 6", "--raw", "--device", "cpu", "--max-new-tokens", "3"]
    return [["list-models"], ["--help"], ["plugins", "--json"], run, [*run, "--json"]]


def test_a_full_disk(model_commands, capsys, monkeypatch):
    """What stdout refuses is told with its reason."""
    for command in model_commands:
        with open("/dev/full", "w") as full, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", full)
            code, err = outcome(capsys, *command)
        assert (code, err) == (1, "error: cannot write to stdout: No space left on device\n")


def test_a_reader_that_has_gone(model_commands, capsys, monkeypatch):
    """Nothing is wrong: quiet, with the code that shells give for it."""
    for command in model_commands:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", pipe)
            assert outcome(capsys, *command) == (141, "")


@pytest.mark.parametrize(
    ("redirect", "code", "err"),
    [
        (">&-", 2, "error: stdout is closed\nhint: send it to /dev/null to do without it\n"),
        ("> /dev/full", 1, "error: cannot write to stdout: No space left on device\n"),
        ("| true", 141, ""),
        ("<&- > /dev/null", 0, ""),
        ("2>&- > /dev/null", 0, ""),
        ("2> /dev/full > /dev/null", 0, ""),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_at_the_end_of_a_process(redirect: str, code: int, err: str, unbuffered: str):
    """Python has nothing to add, whether it buffers or not."""
    command = f"set -o pipefail; {sys.executable} -c 'from ollm import main; main()' --help"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirect}"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, err)


def test_files_do_not_take_the_place_of_closed_streams():
    """A weight file as stderr would be written into."""
    code = (
        "import os\n"
        "from ollm_core.cli.streams import open_missing\n"
        "open_missing()\n"
        "os._exit(os.open('/dev/null', os.O_RDONLY))\n"
    )
    command = f'{sys.executable} -c "{code}" <&- 2>&-'
    assert subprocess.run(["bash", "-c", command], check=False).returncode > 2


@pytest.mark.parametrize(
    ("exhaust", "reason"),
    [
        (lambda: bytearray(1 << 62), "MemoryError"),
        (lambda: torch.empty(1 << 60), "can't allocate memory"),
        (lambda: os.mkdir("/proc/x") or None, "FileNotFoundError"),
    ],
    ids=["Python", "torch", "another error"],
)
def test_out_of_memory(capsys, monkeypatch, exhaust, reason: str):
    """Is said in words, with the exit code of what does not fit."""
    monkeypatch.setattr("ollm_core.cli.run._user_text", lambda *_: exhaust())
    code, err = outcome(capsys, "run", "x")
    expected = 3 if "memory" in reason.lower() else 1
    assert code == expected
    assert err.startswith("error: out of memory: ") == (expected == 3)
    assert reason in err
    assert len(err.splitlines()) == 2
