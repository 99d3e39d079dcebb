"""Passes that were broken off are gone on with, bit for bit, by whoever comes next."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from broken_off_passes import SLIDING, Pass, broken_off, left, open_store
from kept_prefixes import GEOMETRY, content, expected_kv, numbers

from ollm_core.contracts.kv import Checkpoint, KeepsCheckpoints
from ollm_core.kv.disk.directory import home_fields, reap_homes
from ollm_core.kv.disk.unfinished import write_unfinished


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
