"""`ollm doctor`: what it measures, `ollm plan` goes by."""

from __future__ import annotations

import json

import pytest

from ollm_core.calibration import disk
from ollm_core.memory.sizes import format_size

pytestmark = pytest.mark.usefixtures("home")


def test_doctor_measures_for_plan(ollm, tmp_path, monkeypatch):
    """What it prints is what the next plan goes by."""
    options = ["--device", "cpu", "--dtype", "bfloat16", "--models-dir", str(tmp_path)]
    monkeypatch.setattr(disk, "_TRIAL_BYTES", 16 << 20)
    code, out, _ = ollm("doctor", *options, "--json")
    assert code == 0
    measured = json.loads(out)
    assert measured["disk"]["per_second"] > 1e6
    assert {"name", "gain", "hint"} == measured["missing"][0].keys()
    code, out, _ = ollm("plan", "smollm2-135M", *options)
    assert code == 0
    assert f"compute {format_size(measured['compute']['per_second'])[:-1]}FLOP/s (measured" in out
    assert "assumed" not in out
