"""What fits, at a glance: the verdicts agree with plans, and no torch is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ollm
from ollm_core.checkpoint.fit import Machine, least_bytes
from ollm_core.memory.budgets import Budgets, default_shares
from ollm_core.memory.host import HostMemory
from ollm_core.plugins.registry import Registry

ENTRIES = [
    entry for adapter, entry, _ in Registry.discover().catalog() if adapter and entry.weight_bytes
]
LARGE = [entry for entry in ENTRIES if entry.weight_bytes > 2 * 10**9]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "model_id", ["llama3-8B-chat", "llama2-70B-chat", "gpt-oss-20B", "llama3-405B-chat"]
)
def test_least_is_near_the_plans(model_id, device):
    """What is said to stream does, by the plan, in little more; a half of it does not for a dense
    model.
    """
    (entry,) = (one for one in ENTRIES if one.id == model_id)
    told = least_bytes(entry.config, entry.weight_bytes, has_gpu=device == "cuda")
    limits = {"device_memory": told.device * 3 // 2, "host_memory": told.host * 3 // 2}
    assert ollm.plan(model_id, device=device, context=2048, **limits).fits
    if "experts" not in str(entry.config):
        halved = {name: value // 3 for name, value in limits.items()}
        assert not ollm.plan(model_id, device=device, context=2048, **halved).fits


@pytest.mark.parametrize("entry", LARGE, ids=lambda entry: entry.id)
def test_verdicts(entry):
    """More memory is better, and a disk that is too small matters until the model is on it."""
    size, verdicts = entry.weight_bytes, []
    for memory in (10**6, size * 9 // 10, size * 2):
        machine = Machine(False, Budgets(memory, memory), size)
        verdicts.append(machine.fits(entry.config, size, on_disk=False))
    assert verdicts == ["no: memory", "streamed", "in memory"]
    full = Machine(False, Budgets(size * 2, size), size - 1)
    assert full.fits(entry.config, size, on_disk=False) == "no: disk"
    assert full.fits(entry.config, size, on_disk=True) == "in memory"
    beside_gpu = Machine(True, Budgets(size * 6 // 10, size * 6 // 10), size)
    assert beside_gpu.fits(entry.config, size, on_disk=True) == "in memory"


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": "x", "text_config": 3}])
def test_any_config(config):
    """A config that says nothing, or nonsense, has a verdict; a size that is not known has none."""
    machine = Machine(False, Budgets(10**10, 10**10), 10**12)
    assert machine.fits(config, 10**9, on_disk=False) == "in memory"
    assert machine.fits(config, 0, on_disk=False) == "unknown"


def test_the_machine_is_this_one():
    """Its memory is the default of a run, found without torch."""
    machine = Machine.here(5)
    assert machine.free_disk == 5
    assert sum(machine.budgets) <= HostMemory().total() or machine.has_gpu
    if not machine.has_gpu:
        assert machine.budgets.device == pytest.approx(default_shares(None).device, rel=0.1)
    code = (
        "import ollm_core.checkpoint.fit as fit, sys\n"
        "fit.Machine.here(1)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
