"""Passes that were broken off are gone on with, bit for bit; whatever is not as it was is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kept_prefixes import GEOMETRY, content, expected_kv, numbers

from ollm_core.contracts.kv import CacheKind, Checkpoint, KeepsCheckpoints
from ollm_core.errors import DoesNotFitError
from ollm_core.kv.disk.admin import remove_unfinished
from ollm_core.kv.disk.checkpoints import CheckpointingStore
from ollm_core.kv.disk.directory import home_fields, reap_homes
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.kv.disk.unfinished import unfinished_files, write_unfinished
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


def test_it_is_what_the_contract_says(tmp_path):
    """By its types."""
    with open_store(tmp_path) as store:
        assert isinstance(store, KeepsCheckpoints)
        checkpoint: Checkpoint = Pass(store, numbers(30)).checkpoint
        assert checkpoint.num_done == 0


@pytest.mark.parametrize("geometry", [GEOMETRY, SLIDING])
@pytest.mark.parametrize("num_tokens", [32, 33, 30, 31])
@pytest.mark.parametrize("num_kept", [0, 8, 10, 11])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_next_run_goes_on(tmp_path, geometry, num_tokens, num_kept, num_layers):
    """After any number of kept tokens, with full blocks and others, with a window and without."""
    prompt = numbers(num_tokens)
    if num_kept:
        with open_store(tmp_path, geometry) as store:
            one = Pass(store, prompt[:num_kept])
            one.run(saving=False)
            one.finish()
    broken_off(tmp_path, prompt, geometry, num_layers)
    [found] = left(tmp_path)
    assert (found.one.num_done, found.one.num_layers) == (num_layers, 2)
    assert found.one.start == num_kept
    with open_store(tmp_path, geometry) as store:
        one = Pass(store, prompt)
        assert (one.first, one.start) == (num_layers, num_kept)
        one.run()
        one.finish()
        one.check()
        assert left(tmp_path) == []
        again = store.fork(one.sequence)
        store.release(one.sequence)
        for layer_idx in range(2):
            assert store.num_tokens(again, layer_idx) == num_tokens
        store.truncate(again, num_kept if geometry is GEOMETRY else num_tokens - 2)
    assert left(tmp_path) == []
    with open_store(tmp_path, geometry) as store:
        sequence, num_found = store.find(prompt)
        assert num_found >= num_tokens - 4
        assert torch.equal(
            content(store, 0, sequence), expected_kv(prompt, 0, geometry)[:, :, :num_found]
        )


@pytest.mark.parametrize("geometry", [GEOMETRY, SLIDING])
@pytest.mark.parametrize("num_kept", [0, 8, 10])
def test_an_interrupted_run_that_went_on_is_undone(tmp_path, geometry, num_kept):
    """The sequence is as long as it was, with what it had, and can be computed anew."""
    prompt = numbers(31)
    if num_kept:
        with open_store(tmp_path, geometry) as store:
            one = Pass(store, prompt[:num_kept])
            one.run(saving=False)
            one.finish()
    broken_off(tmp_path, prompt, geometry, 2)
    with open_store(tmp_path, geometry) as store:  # what is free has other content then
        other = Pass(store, numbers(31, seed=7))
        other.run(saving=False)
        other.undo()
    with open_store(tmp_path, geometry) as store:
        one = Pass(store, prompt)
        assert one.first == 2
        store.truncate(one.sequence, one.start)
        assert store.num_tokens(one.sequence) == num_kept
        for layer_idx in range(2) if num_kept else ():
            first = geometry.first_needed(layer_idx, num_kept)
            pairs = store.blocks(layer_idx, one.sequence, first=first)
            found = torch.cat([torch.stack(pair) for pair in pairs], dim=2)
            had = expected_kv(prompt[:num_kept], layer_idx, geometry)
            assert torch.equal(found, had[:, :, first:])
        store.reserve(one.sequence, len(prompt))
        one.first = 0
        one.run(saving=False)
        one.finish()
        one.check()
    assert left(tmp_path) == []


def test_the_same_process_goes_on(tmp_path):
    """As after Ctrl-C in a notebook, or where memory ran out in a pass."""
    prompt = numbers(31)
    with open_store(tmp_path) as store:
        one = Pass(store, prompt)
        one.run(1)
        one.undo()
        two = Pass(store, prompt)
        assert two.first == 1
        two.run()
        two.finish()
        two.check()
        assert left(tmp_path) == []


@pytest.mark.parametrize(
    "other",
    [
        {"settings": {**SETTINGS, "chunks": [[0, 8]]}},
        {"settings": {**SETTINGS, "attention": "blockwise"}},
        {"dtypes": [torch.bfloat16]},
    ],
)
def test_other_settings_find_nothing_and_remove_it(tmp_path, other):
    """What would change a bit."""
    prompt = numbers(31)
    broken_off(tmp_path, prompt)
    with open_store(tmp_path) as store:
        assert Pass(store, prompt, **other).first == 0
        assert left(tmp_path) == []


def test_another_prompt_leaves_it(tmp_path):
    """A short question in between does not cost the long one."""
    prompt = numbers(31)
    broken_off(tmp_path, prompt)
    other = prompt.clone()
    other[3] += 1
    with open_store(tmp_path) as store:
        one = Pass(store, other)
        assert one.first == 0
        one.run()
        one.finish()
        assert len(left(tmp_path)) == 1
    with open_store(tmp_path) as store:
        assert Pass(store, prompt).first == 1


def test_it_is_of_use_only_where_it_is_further(tmp_path):
    """Than a prefix: what is kept of most of the prompt is worth more than one layer of two."""
    prompt = numbers(31)
    broken_off(tmp_path, prompt)
    with open_store(tmp_path) as store:
        sequence = store.new_sequence()
        store.reserve(sequence, 24)
        for layer_idx in range(2):
            keys, values = expected_kv(prompt[:24], layer_idx)
            store.append(layer_idx, sequence, keys, values)
        store.keep(sequence, 0, prompt[:24])
        assert Pass(store, prompt).start == 24


def test_a_shorter_prompt_that_is_kept_is_found(tmp_path):
    """Though a long one begins with it, which is far."""
    prompt = numbers(41)
    with open_store(tmp_path) as store:
        one = Pass(store, prompt[:9])
        one.run(saving=False)
        one.finish()
    broken_off(tmp_path, prompt, num_layers=2)
    with open_store(tmp_path) as store:
        assert store.find(prompt[:9])[1] == 9
        assert store.find(prompt[:20])[1] == 9
        assert Pass(store, prompt).first == 2


def test_who_reads_all_of_it_another_way_removes_it(tmp_path):
    """Killed after its tokens were kept, and before it was removed: a prefix is all it takes."""
    prompt = numbers(31)
    with open_store(tmp_path) as store:
        one = Pass(store, prompt)
        assert one.run()
        store.commit(one.sequence)
        store.keep(one.sequence, 0, prompt)
        assert left(tmp_path) == []
    broken_off(tmp_path / "other", prompt)
    with open_store(tmp_path / "other") as store:
        sequence = store.new_sequence()
        for begin, end in ((0, 24), (24, 31)):
            for layer_idx in range(2):
                keys, values = expected_kv(prompt, layer_idx)[:, :, begin:end]
                store.append(layer_idx, sequence, keys, values)
            store.keep(sequence, begin, prompt[begin:end])
            assert len(left(tmp_path / "other")) == (end == 24)


@pytest.mark.parametrize("changed", [slice(0, 3), slice(8, 9)])
def test_a_prefix_that_is_gone_or_another_is_noticed(tmp_path, changed):
    """What layers not done would see is then not what those done saw."""
    prompt = numbers(31)
    with open_store(tmp_path) as store:
        one = Pass(store, prompt[:10])
        one.run(saving=False)
        one.finish()
    broken_off(tmp_path, prompt)
    with open_store(tmp_path) as store:
        store._evict(store._pins[0].prefix.key)
        one = Pass(store, prompt)
        assert (one.first, one.start) == (0, 0)
    assert len(left(tmp_path)) == 0
    broken_off(tmp_path / "other", prompt[:10])
    for kept_before in (True, False):
        with open_store(tmp_path / "two") as store:
            sequence = store.new_sequence()
            for layer_idx in range(2):
                both = expected_kv(prompt[:10], layer_idx)
                if not kept_before and layer_idx:
                    both[:, :, changed] += 1e-3
                store.append(layer_idx, sequence, both[0], both[1])
            store.keep(sequence, 0, prompt[:10])
        if kept_before:
            broken_off(tmp_path / "two", prompt)
            with open_store(tmp_path / "two") as store:
                store._evict(store._pins[0].prefix.key)
    with open_store(tmp_path / "two") as store:
        one = Pass(store, prompt)
        assert (one.first, one.start) == (0, 10)
    assert left(tmp_path / "two") == []


@pytest.mark.parametrize("where", ["hidden", "block", "tail", "cut"])
def test_damage_is_noticed_before_anything_is_computed(tmp_path, where):
    """One bit, in the hidden states or in a block of a layer done: it begins anew."""
    prompt = numbers(31)
    broken_off(tmp_path, prompt)
    [found] = left(tmp_path)
    [path] = unfinished_files(found.directory)
    blocks = found.one.prefix.layers[0].blocks
    target, place = path, found.one.file_bytes - 3
    if where in ("block", "tail"):
        target = found.directory / "layer-00000.kv"
        place = 4096 + blocks[-1 if where == "tail" else 2] * 4096 + 7
    with target.open("r+b") as file:
        if where == "cut":
            file.truncate(found.one.file_bytes - 1)
        else:
            file.seek(place)
            value = file.read(1)[0]
            file.seek(place)
            file.write(bytes([value ^ 4]))
    with open_store(tmp_path) as store:
        one = Pass(store, prompt)
        assert one.first == 0
        one.run()
        one.finish()
        one.check()
    assert left(tmp_path) == []


def test_another_process_that_is_alive_keeps_its_own(tmp_path):
    """Who comes beside it computes by itself; when it is gone, it is gone on with."""
    prompt = numbers(31)
    with open_store(tmp_path) as store, open_store(tmp_path) as beside:
        one = Pass(store, prompt)
        one.run(1)
        two = Pass(beside, prompt)
        assert two.first == 0
        two.run()
        two.undo()
        one.undo()
    assert len(left(tmp_path)) == 2
    with open_store(tmp_path) as store:
        assert Pass(store, prompt).first == 2  # of both, what is further


def test_one_in_another_directory_is_found(tmp_path):
    """That a process has left, while this one began in another."""
    prompt, short = numbers(31), numbers(9, seed=5)
    with open_store(tmp_path) as store, open_store(tmp_path) as beside:
        one = Pass(store, prompt)
        one.run(1)
        one.undo()
        other = Pass(beside, short)
        other.run(saving=False)
        other.finish()
    [found] = left(tmp_path)
    os.utime(found.directory / "prefixes.journal", (1, 1))  # the other one is opened first
    with open_store(tmp_path) as store:
        assert Pass(store, prompt).first == 1
    with open_store(tmp_path) as store:
        assert store.find(short)[1] == 9


def test_the_beginning_may_be_borrowed(tmp_path):
    """Another process keeps what the prompt begins with, before and after."""
    prompt = numbers(31)
    with open_store(tmp_path) as owner:
        one = Pass(owner, prompt[:10])
        one.run(saving=False)
        one.finish()
        owner.keep(one.sequence, 0, prompt[:10])
        broken_off(tmp_path, prompt)
        [found] = left(tmp_path)
        assert found.one.start == 8  # full blocks alone are kept yet
        assert found.directory != owner._disk.home.directory
        with open_store(tmp_path) as store:
            one = Pass(store, prompt)
            assert (one.first, one.start) == (1, 8)
            one.run()
            one.finish()
            one.check()
    assert left(tmp_path) == []


def test_what_killed_processes_leave_is_found(tmp_path):
    """Reaping leaves it, and a second kill in the middle of going on loses nothing."""
    prompt = numbers(31)
    script = (
        "import os, sys; sys.path[:0] = [{tests!r}, {kv!r}]\n"
        "from test_checkpoints import *\n"
        "store = open_store({directory!r}); one = Pass(store, numbers(31))\n"
        "print(one.first, flush=True); one.run({layers}); os.kill(os.getpid(), 9)\n"
    )
    firsts = []
    for layers in (1, 1, 2, 2):
        text = script.format(
            tests=str(Path(__file__).parents[2]), kv=str(Path(__file__).parent),
            directory=str(tmp_path), layers=layers,
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, check=False
        )
        assert done.returncode == -9, done.stderr
        firsts.append(int(done.stdout))
        reap_homes(tmp_path)
    assert firsts == [0, 1, 1, 2]
    with open_store(tmp_path) as store:
        one = Pass(store, prompt)
        assert one.first == 2
        one.finish()
        one.check()
    assert left(tmp_path) == []


def test_a_claim_alone_is_nothing(tmp_path):
    """Of a process that was killed after it had claimed room, and before it had written more."""
    with open_store(tmp_path, budget=10**7) as store:
        one = Pass(store, numbers(31))
        assert one.run(1)
        home = store._disk.home.directory
        claim = replace(left(tmp_path)[0].one, num_done=0)
        prefix = replace(claim.prefix, layers=())
        fields = home_fields(GEOMETRY, "f00d")
        staging = torch.zeros(4096, dtype=torch.uint8)
        write_unfinished(home, fields, replace(claim, prefix=prefix), (), staging)
        reap_homes(tmp_path)
        assert len(left(tmp_path)) == 1  # it is in use
        shutil.copytree(home, tmp_path / "ollm-kv-killed00", copy_function=shutil.copy2)
        (tmp_path / "ollm-kv-killed00").chmod(0o700)
        one.checkpoint.drop()
    assert len(left(tmp_path)) == 1
    reap_homes(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_home_goes_when_nothing_is_left(tmp_path):
    """With the unfinished prompt that was removed; not if a process has it."""
    broken_off(tmp_path, numbers(31))
    with open_store(tmp_path):
        assert len(remove_unfinished(left(tmp_path))) == 1
    assert remove_unfinished(left(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_prefixes_beside_it_stay_and_are_not_moved(tmp_path):
    """Compaction would write into its blocks."""
    first, second, prompt = numbers(9, 3), numbers(9, 4), numbers(31)
    with open_store(tmp_path, budget=10**7) as store:
        for one in (Pass(store, first), Pass(store, second)):
            one.run(saving=False)
            one.finish()
        broken = Pass(store, prompt)
        broken.run(1)
        broken.undo()
        store._evict(store._pins[0].prefix.key)
    with open_store(tmp_path, budget=10**7) as store:
        assert store.find(second)[1] == 9
        one = Pass(store, prompt)
        assert one.first == 1
        one.run()
        one.check()


def test_the_budget_holds_for_it(tmp_path):
    """Least recently used prefixes go for it; where there is no room, nothing is written."""
    old, prompt = numbers(17, 3), numbers(31)
    with open_store(tmp_path) as store:
        one = Pass(store, old)
        one.run(saving=False)
        one.finish()
    kept = take_inventory(tmp_path).num_bytes()
    with open_store(tmp_path, budget=kept + 4096) as store:
        one = Pass(store, prompt)
        assert not one.run(1)
        one.undo()
    assert left(tmp_path) == []
    enough = 40 * 4096
    with open_store(tmp_path, budget=enough) as store:
        one = Pass(store, prompt)
        assert one.run(1)
        found = take_inventory(tmp_path)
        assert found.num_bytes() <= found.num_bytes(claimed=True) <= enough
        one.run(2)
        found = take_inventory(tmp_path)
        assert found.num_bytes() <= found.num_bytes(claimed=True) <= enough
        one.finish()
    assert left(tmp_path) == []


def test_another_prompt_takes_its_room(tmp_path):
    """An unfinished prompt goes like a prefix, when it was not written for longest."""
    prompt = numbers(31)
    broken_off(tmp_path, prompt)
    with open_store(tmp_path, budget=16 * 4096) as store:
        one = Pass(store, numbers(17, 3))
        one.run(saving=False)
        one.finish()
        assert store.find(numbers(17, 3))[1] == 16
    assert left(tmp_path) == []


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    """The pass goes on, and what was written before stays."""
    prompt = numbers(31)
    with open_store(tmp_path) as store:
        one = Pass(store, prompt)
        assert one.run(1)
        monkeypatch.setattr("ollm_core.kv.disk.checkpoints.free_bytes", lambda _: 10)
        one.first = 1
        assert not one.run(2)
        assert left(tmp_path)[0].one.num_done == 1
        one.finish()
        one.check()


def test_a_failing_write_is_not_tried_again(tmp_path, monkeypatch):
    """In the same pass; the pass itself goes on."""
    calls = []

    def failing(*_):
        calls.append(1)
        raise DoesNotFitError("the disk is full")

    with open_store(tmp_path) as store:
        one = Pass(store, numbers(31))
        monkeypatch.setattr("ollm_core.kv.disk.checkpoints.write_unfinished", failing)
        assert not one.run()
        one.finish()
        one.check()
    assert calls == [1]


def test_short_or_unknown_tokens_are_not_written(tmp_path):
    """Less than a block, or after tokens that nobody has told."""
    with open_store(tmp_path) as store:
        assert Pass(store, numbers(4)).checkpoint is None
        sequence = store.new_sequence()
        for layer_idx in range(2):
            keys, values = expected_kv(numbers(5), layer_idx)
            store.append(layer_idx, sequence, keys, values)
        store.reserve(sequence, 30)
        assert store.checkpoint(sequence, numbers(25), SETTINGS, FLOAT) is None


def test_memory_is_paid_for(tmp_path):
    """The account holds nothing more than before, and nothing after."""
    account = MemoryAccount("memory", 10**8)
    prompt = numbers(33)
    with CheckpointingStore(GEOMETRY, account, tmp_path, "f00d") as store:
        one = Pass(store, prompt)
        before = account.peak
        one.run(1)
        assert account.peak == before
        one.undo()
        two = Pass(store, prompt)
        assert two.first == 1
        assert account.peak == before
    assert account.used == 0
