"""The index of cached prefixes: what it is told, whenever it is cut short."""

from __future__ import annotations

import os
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm_core import KVStoreError
from ollm_core.device.buffers import PAGE
from ollm_core.kv.disk.journal import NAME, Journal, LayerBlocks, Prefix, read_journal

FIELDS = {"version": 1, "model": "f00d"}


def prefix(number, num_layers=2):
    """A prefix of some tokens, told apart by `number`."""
    layers = tuple(
        LayerBlocks(i, array("I", range(number)), array("Q", [2**64 - 1] * number))
        for i in range(num_layers)
    )
    return Prefix(array("i", [number, -number]), layers, seconds=number)


steps = st.lists(
    st.tuples(st.sampled_from(["append", "drop", "replace"]), st.integers(0, 4)), max_size=8
)


@settings(max_examples=50, deadline=None)
@given(steps=steps, cut=st.integers(1, 300))
def test_it_holds_what_it_was_told(tmp_path_factory, steps, cut):
    """Kept and dropped in any order, by whoever reads it. Of a journal that lost its end, all is
    there that came before.
    """
    directory = tmp_path_factory.mktemp("journal")
    path, kept = directory / NAME, {}
    sizes = [(PAGE, [])]
    with Journal(directory, FIELDS, create=True) as journal:
        for what, number in [*steps, ("append", 9)]:
            one = prefix(number)
            kept = {key: other for key, other in kept.items() if key != one.key}
            if what == "replace":
                journal.replace([one])
                kept, sizes = {one.key: one}, [(PAGE, [])]
            elif what == "append":
                journal.append(one)
                kept[one.key] = one
            else:
                journal.drop(one.key)
            assert read_journal(directory)[:2] == (FIELDS, list(kept.values()))
            sizes.append((path.stat().st_size, list(kept.values())))
    left = max(path.stat().st_size - cut, PAGE)
    os.truncate(path, left)
    expected = [prefixes for size, prefixes in sizes if size <= left][-1]
    assert read_journal(directory)[:2] == (FIELDS, expected)


def test_an_append_that_fails_leaves_it_as_it_was(tmp_path, monkeypatch):
    """Nothing is torn, and the next one is read."""
    with Journal(tmp_path, FIELDS, create=True) as journal:
        journal.append(prefix(1))
        real = os.pwrite

        def full(file, data, offset):
            if len(data) > 10:
                return real(file, data[:10], offset)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(prefix(2))
        monkeypatch.undo()
        journal.append(prefix(3))
    assert read_journal(tmp_path)[1] == [prefix(1), prefix(3)]


def test_of_another_model_it_is_refused(tmp_path):
    """By the fields of its header."""
    Journal(tmp_path, FIELDS, create=True).close()
    with pytest.raises(KVStoreError, match="made for another model"):
        Journal(tmp_path, FIELDS | {"model": "beef"}, create=False)
