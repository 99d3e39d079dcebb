"""How torch's threads wait: asleep where others compute, and as the user says before all."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from ollm_core.cli.waiting import wait_asleep_beside_others


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """What is set on a machine of four processors and two cores, with so many running threads."""

    def found(running, cpus=(0, 1, 2, 3), loaded=False, **environ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))
        if running:
            (tmp_path / "stat").write_text(f"cpu  1 2 3\nprocs_running {running}\n")
        for cpu in cpus:
            place = tmp_path / f"cpu{cpu}/topology"
            place.mkdir(parents=True, exist_ok=True)
            (place / "core_cpus_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
        with monkeypatch.context() as patched:
            if not loaded:
                patched.delitem(sys.modules, "torch", raising=False)
            wait_asleep_beside_others(environ, tmp_path, tmp_path)
        return environ.get("OMP_WAIT_POLICY")

    return found


@pytest.mark.parametrize(
    ("running", "cpus", "expected"),
    [
        (1, (0, 1, 2, 3), None),  # this process alone
        (3, (0, 1, 2, 3), None),  # two others, on the two processors that torch leaves
        (4, (0, 1, 2, 3), "PASSIVE"),
        (2, (0, 1), "PASSIVE"),  # each a core
        (2, (0, 2), None),  # one core, so one thread, and a processor left
        (3, (0,), None),  # a thread alone waits for nobody
        (None, (0, 1), None),  # the system tells nothing
    ],
)
def test_asleep_where_cores_are_wanted(chosen, running, cpus, expected):
    """Threads of torch and of others that are more than the processors."""
    assert chosen(running, cpus) == expected


def test_threads_that_the_user_asks_for(chosen):
    """Are as many as torch will have."""
    assert chosen(3, OMP_NUM_THREADS="3") == "PASSIVE"
    assert chosen(4, OMP_NUM_THREADS="1") is None


def test_what_is_set_stays(chosen):
    """How threads wait is the user's choice, and nothing is done too late."""
    assert chosen(9, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert chosen(9, GOMP_SPINCOUNT="7") is None
    assert chosen(9, loaded=True) is None


ASK = """
import os
from ollm_core.cli.waiting import wait_asleep_beside_others

wait_asleep_beside_others()
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a thread alone waits for nobody")
def test_this_machine_tells():
    """Beside as many programs that compute as it has processors."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    with ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            command = [sys.executable, "-c", "while True: pass"]
            stack.callback(stack.enter_context(subprocess.Popen(command)).kill)
        found = subprocess.run(
            [sys.executable, "-c", ASK], env=environ, check=True, capture_output=True, text=True
        )
    assert found.stdout.strip() == "PASSIVE"
