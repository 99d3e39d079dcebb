"""A disk budget: what is kept never takes more, and what goes is what was least recently used."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from kept_prefixes import GEOMETRY, add, content, expected_kv, numbers
from kept_states import GEOMETRY as HYBRID
from kept_states import PROMPT, keep_a_run, run
from kept_states import found as found_states

import ollm
from ollm_core import CacheKind, InputError
from ollm_core.kv.disk.admin import pin
from ollm_core.kv.disk.directory import find_homes
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.kv.recurrent.prefix_cache import PrefixCachingHybridStore
from ollm_core.kv.recurrent.snapshots import StateFiles
from ollm_core.kv.recurrent.states import StateStore
from ollm_core.memory.accounts import MemoryAccount

BLOCK = 2 * 4096
"""Of both layers."""


def open_store(directory, num_blocks, geometry=GEOMETRY):
    """A store with a budget of so many blocks."""
    account = MemoryAccount("memory", 10**8)
    return PrefixCachingStore(geometry, account, directory, "f00d", budget=num_blocks * BLOCK)


def keep(directory, num_blocks, *prompts):
    """Each in a run of its own, the clock going on between them."""
    for prompt in prompts:
        with open_store(directory, num_blocks) as store:
            sequence, _ = store.find(prompt)
            add(store, sequence, prompt)
        grow_old(directory)


def grow_old(directory):
    """As if the marks and journals were a hundred seconds older, in the order they are in."""
    for path in directory.glob("*/prefixes.*.used"):
        about = path.stat()
        os.utime(path, (about.st_mtime - 100, about.st_mtime - 100))


def lengths(directory):
    """Tokens of what is kept, as a set."""
    return {len(one.prefix.token_ids) for one in take_inventory(directory).prefixes}


def use(directory, prompt):
    """Find it, which marks it as used."""
    with open_store(directory, 1000) as store:
        return store.find(prompt)[1]


def on_disk(directory):
    """Bytes of all layer files."""
    return sum(path.stat().st_size for path in directory.glob("*/layer-*"))


def test_the_least_recently_used_goes_first(tmp_path, monkeypatch):
    """By the last find, not by when it was kept."""
    now = time.time()
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now + next(clock) * 10)
    one, two, three = (numbers(20, seed) for seed in (1, 2, 3))
    keep(tmp_path, 10, one, two[:16])
    assert lengths(tmp_path) == {20, 16}
    assert use(tmp_path, one) == 20
    (home,) = find_homes(tmp_path)
    later = now + 10**8
    os.utime(next(home.glob("prefixes.*.used")), (later, later))
    keep(tmp_path, 10, three[:17])
    assert lengths(tmp_path) == {20, 17}
    assert take_inventory(tmp_path).num_bytes() <= 10 * BLOCK


def test_files_are_as_long_as_what_is_kept(tmp_path):
    """What has gone gives its space back when the run ends."""
    keep(tmp_path, 10, *(numbers(20, seed) for seed in range(1, 6)))
    assert on_disk(tmp_path) == 10 * BLOCK + 2 * 4096
    with open_store(tmp_path, 10) as store:
        sequence, found = store.find(numbers(20, 5))
        assert found == 20
        for layer_idx in range(2):
            expected = expected_kv(numbers(20, 5), layer_idx)
            assert torch.equal(content(store, layer_idx, sequence), expected)


def test_what_is_pinned_stays(tmp_path, caplog):
    """Then less of the new text is kept, which is told in one line."""
    keep(tmp_path, 10, numbers(24, 1))
    pin(take_inventory(tmp_path).prefixes, pinned=True)
    caplog.set_level(logging.ERROR)
    keep(tmp_path, 10, numbers(40, 2))
    assert lengths(tmp_path) == {24, 16}
    (record,) = caplog.records
    assert record.getMessage().startswith("prefix cache: kv_budget (81.9 kB) has room for 16 to")
    with open_store(tmp_path, 10) as store:
        assert store.find(numbers(40, 2))[1] == 16
    keep(tmp_path, 10, torch.cat([numbers(24, 1), numbers(9, 5)]))
    assert {24} < lengths(tmp_path)  # a longer one does not stand for it
    pin(take_inventory(tmp_path).prefixes, pinned=False)
    keep(tmp_path, 10, numbers(40, 3))
    assert lengths(tmp_path) == {40}


def test_a_text_beyond_the_budget(tmp_path, caplog):
    """Its beginning is kept; with windows, as far as they can be cut."""
    caplog.set_level(logging.ERROR)
    keep(tmp_path, 5, numbers(41))
    assert lengths(tmp_path) == {20}
    sliding = replace(GEOMETRY, kinds=(CacheKind("sliding", 3, 5, window=6),) * 2)
    with open_store(tmp_path / "sliding", 2, sliding) as store:
        add(store, store.new_sequence(), numbers(41))
    assert lengths(tmp_path / "sliding") == {8}  # cut while the window still allowed it
    assert [record.args[1] for record in caplog.records] == [20, 8]


def test_what_shares_blocks_is_counted_once(tmp_path):
    """Two texts that begin alike."""
    common = numbers(32)
    one, two = (torch.cat([common, numbers(4, seed) + 60]) for seed in (8, 9))
    keep(tmp_path, 10, one, two)
    assert take_inventory(tmp_path).num_bytes() == 10 * BLOCK
    assert len(take_inventory(tmp_path).prefixes) == 2


def test_nothing_goes_that_another_process_uses(tmp_path):
    """Owned or read; other homes do."""
    with open_store(tmp_path, 1000) as owner:
        add(owner, owner.new_sequence(), numbers(24, 1))
        with open_store(tmp_path, 8) as other:
            add(other, other.new_sequence(), numbers(40, 2))
        assert lengths(tmp_path) == {24, 8}
    with open_store(tmp_path, 1000) as owner, open_store(tmp_path, 1000) as reader:
        shared = next(one for one in (owner, reader) if one.find(numbers(24, 1))[1] == 24)
        assert shared is owner
        assert reader.find(numbers(24, 1))[1] == 24
        owner.close()
        with open_store(tmp_path / "elsewhere", 1):
            pass
        with open_store(tmp_path, 8) as third:
            add(third, third.new_sequence(), numbers(40, 4))
        assert reader.find(numbers(24, 1))[1] == 24


@pytest.mark.parametrize("seed", range(3))
def test_never_more_than_the_budget(tmp_path, seed):
    """Whatever several stores beside each other keep; and what they find has the right bits."""
    chance, stores = random.Random(seed), {}
    with ExitStack() as stack:
        for step in range(80):
            name = chance.randrange(3)
            if name not in stores:
                stores[name] = stack.enter_context(open_store(tmp_path, 12))
            store = stores[name]
            prompt = torch.cat([numbers(chance.randrange(40), chance.randrange(4)),
                                numbers(chance.randrange(9), 50 + step)])  # fmt: skip
            sequence, found = store.find(prompt)
            for layer_idx in range(2) if found else ():
                expected = expected_kv(prompt[:found], layer_idx)
                assert torch.equal(content(store, layer_idx, sequence), expected)
            add(store, sequence, prompt)
            if chance.randrange(3):
                store.release(sequence)
            if not chance.randrange(4):
                stores.pop(name).close()
            assert take_inventory(tmp_path).num_bytes() <= 12 * BLOCK


def test_one_at_a_time(tmp_path, monkeypatch, caplog):
    """While room is made and used, no other process does; one that never ends is not waited for."""
    from ollm_core.kv.disk import budget

    def is_taken():
        file = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    seen = []
    with open_store(tmp_path, 10) as store:
        real = store._disk.home.keep
        store._disk.home.keep = lambda prefix: (seen.append(is_taken()), real(prefix))
        add(store, store.new_sequence(), numbers(13))
        assert (seen, is_taken()) == ([True, True], False)
        monkeypatch.setattr(budget, "_LONGEST_WAIT", 0.05)
        other = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        add(store, store.new_sequence(), numbers(20, 2))
        os.close(other)
    assert "the prefix cache is not saved" in caplog.text
    assert lengths(tmp_path) == {12}


def test_states_count(tmp_path):
    """A recurrent state is kept where there is room for it, and goes with its prefix."""
    keep_a_run(tmp_path, PROMPT)
    state_bytes = sum(one.num_bytes for one in take_inventory(tmp_path).prefixes[0].states)
    assert state_bytes == 2 * (4096 + 2 * (12 + 16))
    account = MemoryAccount("memory", 64 << 20)
    geometry = HYBRID.attention_layers()
    for budget, expected in ((4096, 0), (state_bytes + 6 * 4096, 21)):
        store = PrefixCachingHybridStore(
            HYBRID,
            PrefixCachingStore(geometry, account, tmp_path, "model", budget=budget),
            StateStore(HYBRID, account, "host", torch.device("cpu")),
            StateFiles(tmp_path, HYBRID, "model"),
        )
        other = [100 + token for token in PROMPT]
        with store:
            sequence = store.new_sequence()
            run(store, sequence, [], other, chunk=4)
            store.commit(sequence)
            store.keep(sequence, 0, torch.tensor(other))
        assert take_inventory(tmp_path).num_bytes() <= budget
        assert found_states(tmp_path, [*other, 1]) == expected
        assert found_states(tmp_path, [*PROMPT, 1]) == 0


def test_the_option(tiny, ids, tmp_path):
    """Of a run; it needs a directory that is kept."""
    for options in ({}, {"kv_dir": tmp_path, "keep_kv": False}):
        with pytest.raises(InputError, match="kv_budget: need a kv_dir that is kept, have none"):
            ollm.load(tiny, device="cpu", kv_budget="1GB", **options)
    for seed in (1, 2):
        with ollm.load(tiny, device="cpu", kv_dir=tmp_path, kv_budget="300kB") as model:
            model.generate(ids(600, seed=seed)[None], max_new_tokens=1, do_sample=False)
    (left,) = take_inventory(tmp_path).prefixes
    assert left.prefix.token_ids.tolist() == ids(600, seed=2)[: len(left.prefix.token_ids)].tolist()
    assert 0 < left.num_bytes <= 300_000
