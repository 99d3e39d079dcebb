"""How many broken adapters, models and parts that the suite's authors have not seen it fails.

python conformance/tests/kill_rate.py FILE.py ...

Each file has a list `UNSEEN` of `Unseen(name, sentence, suite)`, by somebody who has not read
the suite. The whole core level is run on each until the first check fails. Prints a line for each
and the rate.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from broken import Unseen
from power import results

_OPTIONS = [
    "--exitfirst", "--no-header", "-qq", "--no-summary",
    "-k", "not test_imports_clean",  # a file of mutants imports torch for all of them
]  # fmt: skip


def main(paths: list[str]) -> None:
    """Run all mutants of the files, one after the other."""
    torch.set_num_threads(1)
    found = [_run(one) for path in paths for one in _mutants(Path(path))]
    killed = sum(found)
    print(f"{killed} of {len(found)} killed: {100 * killed / max(len(found), 1):.0f}%")  # noqa: T201


def _mutants(path: Path) -> Iterator[Unseen]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path}: expected a Python file with a list UNSEEN")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # adapters are imported again by name, in a fresh interpreter
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    yield from module.UNSEEN


def _run(mutant: Unseen) -> bool:
    start = time.process_time()
    failed = [
        f"{result.check}: {result.detail[:160]}"
        for result in results(mutant.suite, options=_OPTIONS)
        if result.outcome == "failed"
    ]
    told = failed[0] if failed else f"SURVIVED ({mutant.sentence})"
    print(f"{mutant.name}: {told} [{time.process_time() - start:.0f} s]", flush=True)  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
