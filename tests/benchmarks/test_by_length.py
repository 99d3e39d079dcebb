"""benchmarks/prefill/by_length.py: the picture of a record, and what limits a process to AVX2."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.peers.compare import OURS
from benchmarks.prefill.by_length import draw
from benchmarks.tools.instructions import AVX2
from benchmarks.tools.measure import environment


def test_the_picture(tmp_path):
    """Of both programs, or of one where the other failed."""
    runs = {OURS: [{"prefill_s": 2.0}], "llamacpp-avx2": [{"prefill_s": 3.0}]}
    record = {**environment(tmp_path), "avx2": True, "cap_mib": 1500}
    record["prompts"] = {"128": {"runs": runs}, "512": {"runs": {OURS: [{"prefill_s": 5.0}]}}}
    draw(record, tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_torch_obeys_the_limit():
    """A child with this environment has nothing beyond AVX2."""
    code = (
        "import torch;"
        "print(torch.backends.cpu.get_cpu_capability() in ('AVX2', 'DEFAULT', 'NO AVX'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"
