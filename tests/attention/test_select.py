"""Which attention is used: by name, or as was measured on this machine."""

from __future__ import annotations

import json

import pytest
import torch

import ollm
from ollm_core import InputError
from ollm_core.calibration import rates

GPU = torch.device("cuda:0")


def test_refused_by_name(tiny):
    """On a CPU, and in a plan for float32."""
    with pytest.raises(InputError, match="on CUDA, not in float32 on cpu"):
        ollm.load(tiny, device="cpu", attention="flash")
    memory = {"device_memory": "1GB", "host_memory": "1GB"}
    with pytest.raises(InputError, match="not in float32 on cuda"):
        ollm.plan(tiny, device="cuda", attention="flash", context=64, max_new_tokens=4, **memory)


def test_a_plan_goes_by_what_was_measured(monkeypatch, tmp_path, tiny):
    """The package where it is faster by a tenth and works; the memory is the same."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    options = {
        "device": "cuda", "dtype": "bfloat16", "device_memory": "1GB", "host_memory": "1GB",
        "context": 400, "max_new_tokens": 4,
    }  # fmt: skip
    forced = ollm.plan(tiny, attention="flash", **options)
    own = ollm.plan(tiny, attention="blockwise", **options)
    assert (forced.placement["attention"], own.placement["attention"]) == ("flash", "blockwise")
    assert forced.device_peak_bytes == own.device_peak_bytes

    def chosen(works, **found):
        key = rates._device_key(GPU)
        rates.rates_file().parent.mkdir(parents=True, exist_ok=True)
        rates.rates_file().write_text(json.dumps({key: {"attention bfloat16": found}}))
        monkeypatch.setattr(rates, "flash_works", lambda *_: works)
        return rates.fastest_blocks(GPU, torch.bfloat16)

    assert chosen(True, blockwise=1e12, flash=1.05e12) == "blockwise"
    assert chosen(False, blockwise=1e12, flash=2e12) == "blockwise"
    assert chosen(True) == "blockwise"
    assert chosen(True, blockwise=1e12, flash=2e12) == "flash"
    assert rates.fastest_blocks(GPU, torch.float16) == "blockwise"
    assert ollm.plan(tiny, **options).placement["attention"] == "flash"


def test_kernels_of_torch_that_fail_their_trial(monkeypatch, tiny):
    """Products do what "blockwise" and "auto" ask for, and the plan counts their scores."""
    options = {
        "device": "cuda", "dtype": "bfloat16", "device_memory": "1GB", "host_memory": "1GB",
        "context": 600, "max_new_tokens": 4, "attention": "blockwise",
    }  # fmt: skip
    own = ollm.plan(tiny, **options)
    monkeypatch.setattr(rates, "blocks_work", lambda *_: False)
    other = ollm.plan(tiny, **options)
    assert (own.placement["attention"], other.placement["attention"]) == ("blockwise", "products")
    assert other.device_peak_bytes > own.device_peak_bytes
    assert rates.fastest_blocks(GPU, torch.bfloat16) == "products"
