"""The checks of the conformance suite that need a GPU, of one adapter."""

from __future__ import annotations

from benchmarks.gpu.parts.pytests import run_pytest
from benchmarks.gpu.parts.work import Tell, Work
from ollm_conformance.adapter import adapter_checks


def run(work: Work, tell: Tell, adapter: str) -> None:
    """A finding for each check; one that fails is a fault. Raises OutOfTime, RuntimeError."""
    checks = [check.id for check in adapter_checks() if check.level == "gpu"]
    if not work.on_card:
        tell("checks", f"they need a GPU: {', '.join(checks)}")
        return
    scratch = work.path(f"conformance-{adapter}")
    run_pytest(
        work,
        tell,
        [
            *("--pyargs", "ollm_conformance.suite", "--ollm-adapter", adapter),
            *("--ollm-level", "gpu", "--ollm-checks", ",".join(checks)),
            *("--basetemp", str(scratch / "tmp"), "--rootdir", str(scratch), "-c", "/dev/null"),
        ],
    )
