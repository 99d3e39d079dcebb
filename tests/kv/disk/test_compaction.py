"""Files without free slots: what is kept keeps its bits, at whatever moment a process is killed."""

from __future__ import annotations

import os

import pytest
import torch
from kept_prefixes import content, expected_kv, kept, numbers, open_store

from ollm_core.kv.disk import compaction
from ollm_core.kv.disk.admin import remove
from ollm_core.kv.disk.directory import find_homes
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.kv.disk.layer_file import open_own

LENGTHS = {1: 41, 2: 30, 3: 22}


def check(directory, seeds):
    """Just these prompts are found, to the last bit."""
    with open_store(directory) as store:
        for seed, length in LENGTHS.items():
            sequence, found = store.find(numbers(length, seed))
            assert found == (length if seed in seeds else 0)
            for layer_idx in range(2) if found else ():
                expected = expected_kv(numbers(length, seed), layer_idx)
                assert torch.equal(content(store, layer_idx, sequence), expected)
            store.release(sequence)


def slots(directory):
    """Slots in the files of the only home."""
    (home,) = find_homes(directory)
    return {(path.stat().st_size - 4096) // 4096 for path in home.glob("layer-*.kv")}


def remove_first(directory):
    first = next(
        one for one in take_inventory(directory).prefixes if len(one.prefix.token_ids) == 41
    )
    return remove([first])


def test_the_last_blocks_move_into_free_slots(tmp_path):
    """Files end where what is left ends."""
    kept(tmp_path, *(numbers(length, seed) for seed, length in LENGTHS.items()))
    assert slots(tmp_path) == {25}
    assert remove_first(tmp_path) == []
    assert slots(tmp_path) == {14}
    check(tmp_path, {2, 3})


def test_blocks_that_prefixes_share_move_once(tmp_path):
    """And all find them."""
    one, two = numbers(30, 2), torch.cat([numbers(20, 2), numbers(9, 7) + 60])
    kept(tmp_path, numbers(41), one)
    kept(tmp_path, two)
    remove_first(tmp_path)
    assert slots(tmp_path) == {5 + 3 + 3}
    with open_store(tmp_path) as store:
        for prompt in (one, two):
            sequence, found = store.find(prompt)
            assert found == len(prompt)
            for layer_idx in range(2):
                expected = expected_kv(prompt, layer_idx)
                assert torch.equal(content(store, layer_idx, sequence), expected)


@pytest.mark.parametrize("fails_at", ["copy", "fdatasync", "replace", "cut"])
def test_a_kill_at_any_step(tmp_path, monkeypatch, fails_at):
    """The journal is right before and after, and the next time makes it short."""
    kept(tmp_path, *(numbers(length, seed) for seed, length in LENGTHS.items()))

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    done, copy_one = [], compaction._copy

    def copy(*arguments):
        copy_one(*arguments)
        done.append(arguments)
        if len(done) == 5:
            raise Killed

    places = {
        "copy": (compaction, "_copy", copy),
        "fdatasync": (os, "fdatasync", die),
        "replace": (compaction, "_at", die),
        "cut": (os, "ftruncate", die),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*places[fails_at])
        with pytest.raises(Killed):
            remove_first(tmp_path)
    check(tmp_path, {1, 2, 3} if fails_at == "fdatasync" else {2, 3})


def test_who_comes_to_read_meanwhile_reads_on(tmp_path, monkeypatch):
    """The files stay as long as they are, and each slot as it was."""
    kept(tmp_path, *(numbers(length, seed) for seed, length in LENGTHS.items()))
    (home,) = find_homes(tmp_path)
    opened = []

    def open_file(path, flags):
        if not opened:  # the journal says by now what stays
            opened.append(open_store(tmp_path))
            sequence, found = opened[0].find(numbers(30, 2))
            assert found == 30
            opened.append(sequence)
        return open_own(path, flags)

    monkeypatch.setattr(compaction, "open_own", open_file)
    remove_first(tmp_path)
    store, sequence = opened
    with store:
        for layer_idx in range(2):
            expected = expected_kv(numbers(30, 2), layer_idx)
            assert torch.equal(content(store, layer_idx, sequence), expected)
        assert (home / "layer-00000.kv").stat().st_size == 4096 * 26
    monkeypatch.undo()
    check(tmp_path, {2, 3})
