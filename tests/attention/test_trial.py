"""Kernels are tried before they are used: what is right passes, and nothing else."""

from __future__ import annotations

import sys

import flash_reference as reference
import pytest
import torch
from flash_reference import EVERY, PACKAGE, TORCH

from ollm_core import InputError
from ollm_core.attention import trial as attention_rates
from ollm_core.attention.kernels import (
    CpuFlash,
    FlashKernel,
    Products,
    flash_attn_2,
)
from ollm_core.attention.trial import require_flash, trial

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.mark.parametrize("dtype", sorted(EVERY, key=str), ids=str)
def test_a_trial_passes_what_is_right(dtype):
    """Each kernel, in each dtype."""
    for kernel in (PACKAGE, TORCH, Products(), CpuFlash()):
        for head_dim in (64, 20):
            assert trial(kernel, CPU, dtype, head_dim) == ""


def _wrong(change):
    def call(query, keys, values, scaling, causal, before):
        return change(query, keys, values, scaling, causal, before)

    return FlashKernel("wrong", call, EVERY)


def _top_left(query, keys, values, scaling, causal, before):
    more = query.shape[1] - keys.shape[1]
    window = (before - more if before >= 0 else -1, 0 if causal else -1)
    return reference.flash_reference(query, keys, values, scaling, causal, window)


def _heads_in_turn(query, keys, values, *options):
    group = query.shape[2] // keys.shape[2]
    keys, values = (t.repeat(1, 1, group, 1) for t in (keys, values))
    return flash_attn_2(query, keys, values, *options)


def _base_two(*arguments):
    output, lse = flash_attn_2(*arguments)
    return output, lse / 0.6931


WRONG = {
    "no scaling": lambda q, k, v, _, *rest: flash_attn_2(q, k, v, q.shape[-1] ** -1, *rest),
    "not causal": lambda q, k, v, s, _, before: flash_attn_2(q, k, v, s, False, before),
    "no windows": lambda q, k, v, s, causal, _: flash_attn_2(q, k, v, s, causal, -1),
    "a window of one more": lambda *a: flash_attn_2(*a[:5], a[5] + (a[5] >= 0)),
    "windows from the first key": _top_left,
    "query heads in turn": _heads_in_turn,
    "another log-sum-exp": _base_two,
    "no log-sum-exp": lambda *a: (flash_attn_2(*a)[0], None),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_trial_fails_what_is_wrong(what):
    """A build, a version or a device that computes something else is not used."""
    assert trial(_wrong(WRONG[what]), CPU, torch.float16, 32)


def test_without_the_package(monkeypatch):
    """One line that says what to do, where it is asked for by name."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "flash_attn" in trial(FlashKernel("flash-attn", flash_attn_2), CPU, torch.float16, 64)
    monkeypatch.setattr(attention_rates, "_flash_trial", lambda *_: "ModuleNotFoundError: none")
    with pytest.raises(InputError, match="which does not work here: ModuleNotFound") as refused:
        require_flash(GPU, torch.bfloat16, here=True)
    assert "ollm-core[flash-attn]" in refused.value.hint
    require_flash(GPU, torch.bfloat16, here=False)
