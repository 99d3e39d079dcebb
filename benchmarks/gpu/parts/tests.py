"""The tests that need CUDA, tests/gpu."""

from __future__ import annotations

import os

from benchmarks import ROOT
from benchmarks.gpu.parts.pytests import run_pytest
from benchmarks.gpu.parts.work import Tell, Work

DEVICE = "OLLM_TEST_DEVICE"
"""Environment variable: the device on which tests/gpu runs."""


def run(work: Work, tell: Tell, _: str = "") -> None:
    """A finding for each test; one that fails is a fault. Raises OutOfTime, RuntimeError."""
    os.environ[DEVICE] = work.device
    scratch = work.path("tests")
    arguments = ["-m", "gpu", "--rootdir", str(ROOT), "--basetemp", str(scratch / "tmp")]
    only = ["-k", "mxfp4"] if work.small else []
    run_pytest(work, tell, [*arguments, *only, str(ROOT / "tests" / "gpu")])
