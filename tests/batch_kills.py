"""Runs `ollm batch` again and again and kills it with -9 at moments of chance, until so many kills
have hit.

    python batch_kills.py MODEL IN.jsonl DIRECTORY NUM_KILLS SEED

Prints JSON: kills that hit, and the outputs of batches that came to their end; the first of these
was never killed.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from killed_runs import ends, start


def run(model: str, rows: str, directory: Path, num_kills: int, seed: int) -> dict:
    """See above."""
    chance, log = random.Random(seed), directory / "log"
    outputs = [directory / "whole.jsonl"]

    def begin(output: Path) -> int:
        arguments = ["batch", model, rows, str(output), "--device", "cpu", "--dtype", "float32"]
        return start(arguments, log)

    began = time.monotonic()
    assert ends(begin(outputs[0]), 300)
    whole = time.monotonic() - began
    kills, output = 0, directory / "out1.jsonl"
    while kills < num_kills or output.exists():
        seconds = chance.random() * whole if kills < num_kills else 300
        # Most of them count from the moment that a run has opened its output.
        opened = output.with_name(f"{output.name}.job").exists if kills % 4 else lambda: True
        if ends(begin(output), seconds, opened):
            outputs.append(output)
            output = directory / f"out{len(outputs)}.jsonl"
        else:
            kills += 1
    return {"kills": kills, "outputs": [str(path) for path in outputs]}


if __name__ == "__main__":
    model, rows, directory, num_kills, seed = sys.argv[1:]
    print(json.dumps(run(model, rows, Path(directory), int(num_kills), int(seed))))  # noqa: T201
