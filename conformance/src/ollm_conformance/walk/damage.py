"""Damage of any byte that is kept on disk."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from ollm_conformance.compare import same_within
from ollm_conformance.found_again import not_misled
from ollm_conformance.seeds import run_seed
from ollm_conformance.subject import CHUNK, Subject

_NUM_TOKENS = 6 * CHUNK
"""More than two blocks of KV, which are read together, and a part of one."""
_LENGTH = 64
"""Bytes that are damaged in a row."""


def damage_anywhere(subject: Subject, num_places: int) -> None:
    """Keep a prompt, damage a copy of what was kept at a random place, ask for the prompt again:
    it is an error in one line, or the logits are right. Raises AssertionError.
    """
    draw = random.Random(run_seed())
    kept, prompt = subject.new_directory(), subject.prompt(_NUM_TOKENS + 1)
    expected = subject.reference().run(prompt, last_only=True)
    with subject.open(kv="disk", kv_dir=kept, keep_kv=True) as model:
        model(input_ids=prompt[None, :-1], logits_to_keep=1)
        files = sorted(path for path in kept.rglob("*") if path.is_file() and path.stat().st_size)
        for path, place in _places(draw, files, num_places):
            directory = subject.copy(kept)
            damaged = directory / path.relative_to(kept)
            _damage(damaged, place)
            what = f"{damaged.name} with {_LENGTH} other bytes at {place}"
            logits = not_misled(model, prompt, directory, what)
            if logits is not None:
                same_within(logits, expected, 1e-4, f"logits after {what}")
            shutil.rmtree(directory)


def _places(draw: random.Random, files: list[Path], num_places: int) -> Iterator[tuple[Path, int]]:
    """Random ones, in files as they are drawn and not by their size: some are small."""
    for _ in range(num_places):
        path = draw.choice(files)
        yield path, draw.randrange(max(path.stat().st_size - _LENGTH, 1))


def _damage(path: Path, place: int) -> None:
    """Change what is there."""
    with path.open("r+b") as file:
        file.seek(place)
        there = file.read(_LENGTH)
        file.seek(place)
        file.write(bytes(one ^ 0x55 for one in there))
