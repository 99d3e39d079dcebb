"""What is kept of a pass is not used for what is not as it was."""

from __future__ import annotations

import pytest
import torch
from broken_off_passes import SETTINGS, Pass, broken_off, left, open_store
from kept_prefixes import expected_kv, numbers

from ollm_core.kv.disk.unfinished import unfinished_files


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
