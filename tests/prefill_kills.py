"""Runs `ollm run` and `ollm ask` on one long document again and again, and kills them with -9 at
moments of chance, until so many kills have hit. Of `run` and of one question the prompt is a pass;
several questions wait for what they have in common, and are then answered together.

    python prefill_kills.py MODEL FILE DIRECTORY NUM_KILLS SEED

A series of runs in a directory of its own goes on until one of them has come to its end. Prints
JSON: kills that hit, how many of these left something to go on with, how many runs went on, what
each verb answered when it was never killed and when it was, and files that were left behind.
"""

from __future__ import annotations

import functools
import json
import random
import re
import sys
import time
from pathlib import Path

from killed_runs import ends, start

import ollm_core.engine.engine as engine
from ollm_core.engine.checkpoint import CheckpointPolicy
from ollm_core.kv.disk.inventory import take_inventory

VERBS = {
    "run": ["run", "--prompt", "7 8 9"],
    "ask": ["ask", "-q", "7 8 9"],
    "ask of several": ["ask", "-q", "7 8 9", "-q", "10 11", "-q", "12 13 14 15"],
}
GOES_ON = re.compile(r"going on from (?:layer (\d+) of|the last layer)")
NUM_LAYERS = 8


def begin(verb: str, model: str, file: str, kv_dir: Path) -> int:
    """-> the process."""
    verb, *asked = VERBS[verb]
    arguments = [verb, model, "--file", file, *asked, "--json", "--device", "cpu"]
    arguments += ["--kv", "disk", "--kv-dir", str(kv_dir), "--chunk-size", "64"]
    arguments += ["--max-new-tokens", "6", "--kv-budget", "200MB"]
    return start(arguments, kv_dir.parent / "out", kv_dir.parent / "err")


def answers_of(directory: Path) -> list[list[int]]:
    """Token ids that a run has told, of each answer."""
    told = json.loads((directory / "out").read_text())
    return [one["token_ids"] for one in told.get("answers", [told])]


def num_done(kv_dir: Path) -> tuple[int, set[int]]:
    """How many computed tokens what is there is as good as; and of how many layers the next run
    goes on, 0 where a kept prefix is better. Where it is as good, as after a kill between keeping
    all and dropping the checkpoint, either will do.
    """
    if not kv_dir.exists():
        return 0, {0}
    found = take_inventory(kv_dir)
    kept = max((len(one.prefix.token_ids) for one in found.prefixes), default=0)
    begun = max(found.unfinished, key=lambda one: one.one.worth, default=None)
    if begun is None or begun.one.worth < kept:
        return kept, {0}
    done = begun.one.num_done
    return begun.one.worth, {0, done} if begun.one.worth == kept else {done}


def went_on(directory: Path) -> int:
    """Layers that the last run did not compute."""
    found = GOES_ON.search((directory / "err").read_text())
    return 0 if found is None else int(found[1] or NUM_LAYERS + 1) - 1


def run(model: str, file: str, directory: Path, num_kills: int, seed: int) -> dict:
    """See above."""
    chance = random.Random(seed)
    told = {"kills": 0, "saved": 0, "went_on": 0, "expected": {}, "answers": {}, "left": []}
    seconds = {}
    for verb in VERBS:
        place = directory / verb
        place.mkdir()
        began = time.monotonic()
        assert ends(begin(verb, model, file, place / "kv"), 300), (place / "err").read_text()
        seconds[verb] = time.monotonic() - began
        told["expected"][verb], told["answers"][verb] = answers_of(place), []
    number = 0
    while told["kills"] < num_kills:
        verb, number = list(VERBS)[number % len(VERBS)], number + 1
        place = directory / f"series{number}"
        place.mkdir()
        kv_dir, through = place / "kv", False
        while not through:
            before, killing = num_done(kv_dir), told["kills"] < num_kills
            worth, layers = before
            most = chance.uniform(0.1, 1.1) * seconds[verb] if killing else 300
            through = ends(begin(verb, model, file, kv_dir), most)
            on = went_on(place)
            assert on in (layers if through else {0, *layers}), (on, before)
            told["went_on"] += on > 0
            if not through:
                after = num_done(kv_dir)
                assert after[0] >= worth, (after, before)
                told["kills"] += 1
                told["saved"] += max(after[1]) > 0
        told["answers"][verb].append(answers_of(place))
        told["left"] += [path.name for path in kv_dir.rglob("*") if "unfinished" in path.name]
    return told


if __name__ == "__main__":
    always = functools.partial(CheckpointPolicy, least_tokens=300, after_seconds=0, share=1e9)
    engine.CheckpointPolicy = always
    model, file, directory, num_kills, seed = sys.argv[1:]
    print(json.dumps(run(model, file, Path(directory), int(num_kills), int(seed))))  # noqa: T201
