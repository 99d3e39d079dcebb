"""Attention kernels, measured, and what `ollm doctor` says of them."""

from __future__ import annotations

import json

import torch
from click.testing import CliRunner

from ollm_core.attention.kernels import (
    CpuFlash,
    Products,
)
from ollm_core.calibration import rates
from ollm_core.calibration.attention import measure_kernels
from ollm_core.cli.main import cli

CPU = torch.device("cpu")


def test_measured_in_turns():
    """A rate for each kernel that is given."""
    found = measure_kernels(
        {"blockwise": CpuFlash(), "products": Products()}, CPU, torch.float32,
        num_new=16, num_blocks=2,
    )  # fmt: skip
    assert set(found) == {"blockwise", "products"}
    assert all(rate > 0 for rate in found.values())


def test_the_doctor_tells(monkeypatch, tmp_path):
    """What it has kept for the device, beside the other rates."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ollm_core.calibration.disk._TRIAL_BYTES", 1 << 20)
    rates.rates_file().parent.mkdir(parents=True)
    found = {"attention bfloat16": {"blockwise": 2e12, "flash": 3e12, "products": 1e12}}
    rates.rates_file().write_text(json.dumps({rates._device_key(CPU): found}))
    options = ["doctor", "--device", "cpu", "--models-dir", str(tmp_path)]
    told = CliRunner().invoke(cli, options)
    assert told.exit_code == 0, told.output
    assert (
        "flash attention is the fastest: blockwise 2000, flash 3000, products 1000" in told.output
    )
