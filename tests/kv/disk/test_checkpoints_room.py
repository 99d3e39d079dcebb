"""What is kept of a pass takes its room on the disk and in memory, and no more."""

from __future__ import annotations

from broken_off_passes import FLOAT, SETTINGS, Pass, broken_off, left, open_store
from kept_prefixes import GEOMETRY, expected_kv, numbers

from ollm_core.errors import DoesNotFitError
from ollm_core.kv.disk.admin import remove_unfinished
from ollm_core.kv.disk.checkpoints import CheckpointingStore
from ollm_core.kv.disk.inventory import take_inventory
from ollm_core.memory.accounts import MemoryAccount


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
