"""One part in this process: its findings are lines of JSON on stdout, and so is how it failed.

usage: child.py MODULE ARGUMENT WORK
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_parts.work import OutOfTime, Work, print_finding


def main(module: str, argument: str, work: Work) -> int:
    """The exit code."""
    signal.alarm(int(max(work.seconds_left, 0)) + 60)  # should nobody be there to end this
    try:
        importlib.import_module(f"gpu_parts.{module}").run(work, print_finding, argument)
    except OutOfTime as error:
        print(json.dumps({"error": _line(error), "out_of_time": True}), flush=True)
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is told)
        told = {"error": f"{type(error).__name__}: {_line(error)}"}
        print(json.dumps({**told, "traceback": traceback.format_exc()}), flush=True)
        return 1
    return 0


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


if __name__ == "__main__":
    # What libraries print goes to stderr: stdout is for findings alone.
    findings = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(findings, "w")
    code = main(sys.argv[1], sys.argv[2], Work.from_json(sys.argv[3]))
    sys.stdout.flush()
    os._exit(code)  # a broken CUDA context may hang where libraries take leave
