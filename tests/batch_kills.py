"""Runs `ollm batch` again and again and kills it with -9 at moments of chance, until so many kills
have hit. Each run is a process of its own, forked from one that has torch imported.

    python batch_kills.py MODEL IN.jsonl DIRECTORY NUM_KILLS SEED

Prints JSON: kills that hit, and the outputs of batches that came to their end; the first of these
was never killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import ollm_core.api
import ollm_core.serving.jobs.job  # noqa: F401 # once, for all processes
from ollm_core.cli.main import main


def start(model: str, rows: str, output: Path, log: Path) -> int:
    """-> the process."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        arguments = ["batch", model, rows, str(output), "--device", "cpu", "--dtype", "float32"]
        main(arguments)
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def wait(child: int, seconds: float, settings: Path | None = None) -> bool:
    """Whether it ended by itself, well; else it is killed after so long, or so long after it has
    opened its output.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until or not (settings is None or settings.exists()):
        if settings is not None and not settings.exists():
            until = time.monotonic() + seconds
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"exit status {status}"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert status == 0, f"exit status {status}"
    return True


def run(model: str, rows: str, directory: Path, num_kills: int, seed: int) -> dict:
    """See above."""
    chance, log = random.Random(seed), directory / "log"
    outputs = [directory / "whole.jsonl"]
    began = time.monotonic()
    assert wait(start(model, rows, outputs[0], log), 300)
    whole = time.monotonic() - began
    kills, output = 0, directory / "out1.jsonl"
    while kills < num_kills or output.exists():
        seconds = chance.random() * whole if kills < num_kills else 300
        child = start(model, rows, output, log)
        if wait(child, seconds, output.with_name(f"{output.name}.job") if kills % 4 else None):
            outputs.append(output)
            output = directory / f"out{len(outputs)}.jsonl"
        else:
            kills += 1
    return {"kills": kills, "outputs": [str(path) for path in outputs]}


if __name__ == "__main__":
    model, rows, directory, num_kills, seed = sys.argv[1:]
    print(json.dumps(run(model, rows, Path(directory), int(num_kills), int(seed))))  # noqa: T201
