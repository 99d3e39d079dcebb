"""Chooses how torch's threads wait for work: spinning or asleep. It must be chosen before torch is
loaded.

By default they ask for it again and again, which is the quickest where each has a core of its own.
Where another program computes too, they so keep each other from the core that they wait for: with
one such program on two cores, decoding has been fifteen times as slow. Asleep, they lose little
(benchmarks/decode/waiting.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from statistics import median_low

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SAMPLES = 7
_SECONDS = 0.015
"""Between two looks at who wants a core; others come and go."""


def wait_asleep_beside_others(
    environ: MutableMapping[str, str] = os.environ,
    proc: Path = Path("/proc"),
    cpus: Path = Path("/sys/devices/system/cpu"),
) -> None:
    """Set OMP_WAIT_POLICY in `environ` where others compute on cores that torch's threads will
    want.

    Does nothing if the user has set how threads wait, if torch is loaded already, or where the
    system does not tell.
    """
    if "torch" in sys.modules or any(name in environ for name in _SETTINGS):
        return
    usable = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    if len(usable) < 2:  # a thread alone waits for nobody
        return
    others = _num_others(proc / "stat")
    if others and others + _num_threads(environ, cpus, usable) > len(usable):
        environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _num_others(stat: Path) -> int:
    """Threads of other programs that run or could, at most times; 0 where nobody tells."""
    seen = []
    for _ in range(_SAMPLES):
        try:
            lines = stat.read_text().splitlines()
        except OSError:
            return 0
        running = (line.split()[1] for line in lines if line.startswith("procs_running "))
        seen.append(int(next(running, "1")) - 1)  # this one runs
        time.sleep(_SECONDS)
    return max(median_low(seen), 0)


def _num_threads(environ: MutableMapping[str, str], cpus: Path, usable: set[int]) -> int:
    """As many as torch will start: what the user has set, or one for each core, which may be two
    processors of the system.
    """
    stated = environ.get("OMP_NUM_THREADS", "")
    if stated.isdecimal():
        return int(stated)
    cores = set()
    for cpu in usable:
        try:
            cores.add((cpus / f"cpu{cpu}/topology/core_cpus_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)
