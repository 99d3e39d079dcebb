"""Rates that were measured are kept, found again, and not believed when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ollm
from ollm_core.calibration import disk, rates
from ollm_core.calibration.rates import find_rates, measure_rates

pytestmark = pytest.mark.usefixtures("home")


def test_measured_rates_are_kept_and_used(tmp_path, monkeypatch):
    """Measured once, for this disk, device and dtype; what was not measured is assumed."""
    cpu = torch.device("cpu")
    assert find_rates(tmp_path, cpu, torch.float32).disk.source == "assumed"
    monkeypatch.setattr(disk, "_TRIAL_BYTES", 8 << 20)
    measured = measure_rates(tmp_path, cpu, torch.float32)
    assert measured == find_rates(tmp_path, cpu, torch.float32)
    for rate in (measured.disk, measured.memory, measured.compute):
        assert rate.source.startswith("measured 20")
        assert rate.per_second > 1e6
    assert not list(tmp_path.glob("ollm-doctor-*"))
    other = find_rates(tmp_path, cpu, torch.bfloat16)
    assert (other.disk, other.compute.source) == (measured.disk, "assumed")
    assert find_rates(tmp_path, torch.device("cuda:0"), torch.float32).bus.source == "assumed"
    found = ollm.plan("smollm2-135M", device="cpu", dtype="float32", models_dir=tmp_path)
    assert found.rates == measured


@pytest.mark.parametrize("content", ["", "[]", '{"disk 0:0": 3}', "\x00"])
def test_damaged_rates_are_as_none(tmp_path, home, content):
    """They are measured again, not believed."""
    file = rates.rates_file()
    assert file.is_relative_to(home)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert find_rates(Path(tmp_path), torch.device("cpu"), torch.float32).disk.source == "assumed"
