"""Passes over a prompt that are broken off, for tests of what is kept of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from kept_prefixes import GEOMETRY, expected_kv

from ollm_core.contracts.kv import CacheKind
from ollm_core.kv.disk.checkpoints import CheckpointingStore
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.memory.accounts import MemoryAccount

SETTINGS = {"attention": "exact", "chunks": [[0, 4]]}
FLOAT = [torch.float32]
SLIDING = replace(GEOMETRY, kinds=(CacheKind("full", 3, 5), CacheKind("sliding", 3, 5, window=6)))
HIDDEN = 7


def open_store(directory, geometry=GEOMETRY, budget=None):
    """A store as a run has it."""
    account = MemoryAccount("memory", 10**8)
    return CheckpointingStore(geometry, account, Path(directory), "f00d", budget=budget)


def hidden_after(layer_idx, prompt, start):
    """What a layer gives, in two chunks."""
    made = torch.Generator().manual_seed(layer_idx * 1000 + len(prompt))
    return list(torch.randn(len(prompt) - start, HIDDEN, generator=made).split(9))


class Pass:
    """A pass over a prompt, as an engine runs it: stopped after some layers, or through."""

    def __init__(self, store, prompt, settings=SETTINGS, dtypes=FLOAT):
        self.store, self.prompt = store, prompt
        self.sequence, self.start = store.find(prompt[:-1])
        store.reserve(self.sequence, len(prompt))
        new = prompt[self.start :]
        self.checkpoint = store.checkpoint(self.sequence, new, settings, dtypes)
        self.first = self.checkpoint.num_done if self.checkpoint else 0
        if self.first:
            hidden = [torch.empty_like(one) for one in hidden_after(0, prompt, self.start)]
            self.checkpoint.restore(hidden)
            before = hidden_after(self.first - 1, prompt, self.start)
            assert all(map(torch.equal, hidden, before))

    def run(self, num_layers=2, saving=True):
        """Layers up to so many, each with its checkpoint; -> whether all of these were saved."""
        saved = []
        for layer_idx in range(self.first, num_layers):
            whole = expected_kv(self.prompt, layer_idx, self.store.geometry)
            for begin in range(self.start, len(self.prompt), 5):
                end = min(begin + 5, len(self.prompt))
                keys, values = whole[:, :, begin:end]
                self.store.append(layer_idx, self.sequence, keys, values)
            if saving:
                after = hidden_after(layer_idx, self.prompt, self.start)
                saved.append(self.checkpoint.save(layer_idx + 1, after))
        return all(saved)

    def undo(self):
        """As an interrupted one is."""
        self.store.truncate(self.sequence, self.start)
        self.store.release(self.sequence)

    def finish(self):
        """It is through."""
        self.store.commit(self.sequence)
        if self.checkpoint:
            self.checkpoint.finish()
        self.store.keep(self.sequence, self.start, self.prompt[self.start :])

    def check(self):
        """Both layers have just what they should."""
        for layer_idx in range(2):
            window = self.store.geometry.kinds[layer_idx].window
            first = 0 if window is None else len(self.prompt) - window + 1
            pairs = self.store.blocks(layer_idx, self.sequence, first=first)
            found = torch.cat([torch.stack(pair) for pair in pairs], dim=2)
            expected = expected_kv(self.prompt, layer_idx, self.store.geometry)
            assert torch.equal(found, expected[:, :, first:])


def broken_off(directory, prompt, geometry=GEOMETRY, num_layers=1, **options):
    """A run that was interrupted after so many layers."""
    with open_store(directory, geometry, **options) as store:
        one = Pass(store, prompt)
        assert one.run(num_layers)
        one.undo()


def left(directory):
    """Unfinished prompts in a directory."""
    return take_inventory(Path(directory)).unfinished
