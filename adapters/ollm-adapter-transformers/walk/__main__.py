"""Tries every causal model type of the installed transformers, and writes the page about it:

    python adapters/ollm-adapter-transformers/walk [--jobs N] [--seconds N] [--page FILE] [TYPE...]

Each type runs in a process of its own, with bounds on time and memory. What is known of a type is
kept in `.walk/`, so that a walk goes on where it stopped; types that are named are tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

SECONDS, MEMORY = 60, 8 << 30
"""Bounds of one type: of the processor's time, and in bytes. The clock may run four times that."""
KNOWN = Path(".walk")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=0, help="stop after so many, 0: never")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    os.environ["OLLM_LOAD_PLUGINS"] = "ollm-adapter-transformers"
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    KNOWN.mkdir(exist_ok=True)
    types = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    started = time.monotonic()
    waiting = given.types or [one for one in types if not (KNOWN / f"{one}.json").exists()]
    running: dict[int, str] = {}
    while waiting or running:
        late = given.seconds and time.monotonic() - started > given.seconds
        if late:
            waiting = []
        while waiting and len(running) < given.jobs:
            model_type = waiting.pop(0)
            running[_start(model_type)] = model_type
        if running:
            pid, status = os.wait()
            model_type = running.pop(pid)
            if status:
                _write(model_type, {"failed": f"the process ended with status {status}"})
    from page import page

    results = {
        one: json.loads((KNOWN / f"{one}.json").read_text())
        for one in types
        if (KNOWN / f"{one}.json").exists()
    }
    text = page(results, transformers.__version__)
    if given.page:
        given.page.write_text(text)
    sys.stdout.write(text.split("\n\n")[2] + "\n")


def _start(model_type: str) -> int:
    """A process that tries it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(4 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        warnings.simplefilter("ignore")
        from trial import try_type

        found = try_type(model_type)
        _write(model_type, found)
        status = 0
    except BaseException as error:  # noqa: BLE001 - whatever it is belongs on the page
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _write(model_type, {"failed": told, "traceback": traceback.format_exc()[-3000:]})
        status = 0
    finally:
        os._exit(status)


def _write(model_type: str, found: dict[str, str]) -> None:
    (KNOWN / f"{model_type}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
