"""What rows share is told by the blocks that their sequences have stored."""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core.engine.batch import NewTokens
from ollm_core.engine.row_sharing import RowSharing
from ollm_core.engine.traced_cache import APART, Sharing

ONE = torch.zeros(1, dtype=torch.long)


@pytest.fixture
def read(tiny, ids):
    """How rows share, a store, and a sequence in it of 600 tokens: two blocks, and some more."""
    with ollm.load(tiny, device="cpu") as model:
        cache = model.new_cache("host")
        store, sequence = cache.store, cache.store.new_sequence()
        model.engine.run(store, [NewTokens(sequence, ids(600), 0)])
        workspace = model.engine._pass_planner._workspace
        yield RowSharing(workspace._skeleton, workspace._geometry), store, sequence


def step(store, sequence):
    """One more token."""
    return NewTokens(sequence, ONE, store.num_tokens(sequence))


def test_forks_share_their_full_blocks(read):
    """Both rows in one run of two blocks, each with a block of its own at most."""
    rows, store, sequence = read
    work = [step(store, sequence), step(store, store.fork(sequence))]
    assert rows.of(store, work) == Sharing(((0, 1), (0, 1)), (), store.block_size)
    [run] = rows.runs(store, work)
    assert (run.rows, run.first, run.end) == ((0, 1), 0, 512)


def test_packed_rows_keep_their_lengths(read):
    """Which rows are in a run is then told by their own numbers."""
    rows, store, sequence = read
    work = [step(store, sequence), step(store, store.fork(sequence))]
    assert rows.packs
    assert rows.of(store, work, (1, 3)) == Sharing(((0, 1),), (1, 3), store.block_size)


def test_one_row_and_strangers_share_nothing(read):
    """Nor do forks of less than a block."""
    rows, store, sequence = read
    assert rows.of(store, [step(store, sequence)]) == APART
    strangers = [step(store, sequence), step(store, store.new_sequence())]
    assert rows.of(store, strangers) == APART
    short = [step(store, store.fork(sequence, 100)) for _ in range(2)]
    assert rows.of(store, short) == APART


def test_layers_that_differ_are_told_apart(read):
    """As after an error that has left some cut and others not: nothing is said of them."""
    rows, store, sequence = read
    work = [step(store, sequence), step(store, store.fork(sequence))]
    store._manager.cut(0, store._tables[work[1].sequence][0], 256)
    assert rows.of(store, work) is None
