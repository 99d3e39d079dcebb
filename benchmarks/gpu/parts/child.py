"""One part in this process: its findings are lines of JSON on stdout, and so is how it failed.

usage: python benchmarks gpu/parts/child MODULE ARGUMENT WORK
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from typing import IO

from benchmarks.gpu.parts.work import OutOfTime, Work, teller


def main(module: str, argument: str, work: Work, out: IO[str]) -> int:
    """The exit code."""
    signal.alarm(int(max(work.seconds_left, 0)) + 60)  # should nobody be there to end this
    told: dict[str, object] = {}
    try:
        importlib.import_module(f"benchmarks.gpu.parts.{module}").run(work, teller(out), argument)
    except OutOfTime as error:
        told = {"error": _line(error), "out_of_time": True}
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is told)
        name = type(error).__name__
        told = {"error": f"{name}: {_line(error)}", "traceback": traceback.format_exc()}
    if told:
        print(json.dumps(told), file=out, flush=True)
    return int("traceback" in told)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


if __name__ == "__main__":
    # Findings alone go to stdout, and that past what pytest captures; the rest goes to stderr.
    findings = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    code = main(sys.argv[1], sys.argv[2], Work.from_json(sys.argv[3]), findings)
    os._exit(code)  # a broken CUDA context may hang where libraries take leave
