"""The KV tiers of core: a name, and a row that says what each is made of."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core import Capability, UnsupportedError
from ollm_core.contracts.kv import KV_TIERS
from ollm_core.kv.tiers import TIERS, check_tier

ONE_MORE = """
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

CHANGES = {
    "ollm_core.contracts.kv": ('KV_TIERS = ("device",', 'KV_TIERS = ("shelf", "device",'),
    "ollm_core.kv.tiers": (
        '"disk": KVTier(', '"shelf": KVTier(_open_on_host, _simulate_on_host), "disk": KVTier('
    ),
}

class Changed(SourceFileLoader):
    def get_code(self, name):
        if name not in CHANGES:
            return real(self, name)
        old, new = CHANGES[name]
        text = Path(self.path).read_text()
        assert text.count(old) == 1, name
        return self.source_to_code(text.replace(old, new), self.path)

real, SourceFileLoader.get_code = SourceFileLoader.get_code, Changed.get_code

import torch
import ollm
model, options = sys.argv[1], {"device": "cpu", "device_memory": "1GB", "host_memory": "1GB"}
with ollm.load(model, kv="shelf", **options) as opened:
    found = opened.generate(torch.arange(10, 30)[None], max_new_tokens=4, do_sample=False)
    print(opened.stats.kv_tier, found[0, -4:].tolist())
plan = ollm.plan(model, kv="shelf", context=64, max_new_tokens=4, **options)
print(plan.placement["kv"])
print("shelf, device, host and disk" in ollm.load.__doc__)
"""


def test_every_name_has_a_row():
    """In the order in which "auto" tries them."""
    assert tuple(TIERS) == KV_TIERS


def test_one_more_tier_is_a_name_and_a_row(tiny, ids):
    """With two files of core changed so, a run, a plan and help() know it."""
    with ollm.load(tiny, device="cpu", device_memory="1GB", kv="host") as model:
        expected = model.generate(
            ids(20).new_tensor(range(10, 30))[None], max_new_tokens=4, do_sample=False
        )
    command = [sys.executable, "-c", ONE_MORE, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines() == [f"shelf {expected[0, -4:].tolist()}", "shelf", "True"]


def test_a_family_may_refuse_a_tier():
    """If there is a capability of that name: one that core has beside is for all families."""

    class OnDiskOnly(LlamaAdapter):
        capabilities = {"kv-host": Capability("unsupported", "it must not")}  # noqa: RUF012

    check_tier(OnDiskOnly(), "disk")
    check_tier(OnDiskOnly(), "shelf")
    with pytest.raises(UnsupportedError, match="kv-host"):
        check_tier(OnDiskOnly(), "host")
