"""New tokens of many sequences, cut into chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
from ragged_pass import alone

import ollm
from ollm_core.engine.batch import NewTokens, cut_chunks, stage_of


def test_ragged_pass_equals_each_alone(tiny, ids):
    """A prompt, a decode step and a draft in one pass give the logits of three passes."""
    with ollm.load(tiny, device="cpu", chunk_size=32) as model:
        cache = model.new_cache("device")
        store = cache.store
        expected, work = alone(model, store, ids)
        passes = model.stats.weight_passes
        found = model.engine.run(store, work)
        assert model.stats.weight_passes == passes + 1
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("num_new", "start", "num_logits", "num_drafted", "stage"),
    [
        (9, 0, 1, 0, "prefill"),
        (1, 9, 1, 0, "decode"),
        (4, 9, 4, 3, "decode"),
        (4, 0, 4, 3, "prefill"),  # whatever is drafted after nothing
        (9, 64, 1, 0, "prefill"),
        (9, 64, 9, 0, "prefill"),  # a later part of a prompt that is scored
    ],
)
def test_what_a_pass_is_for(ids, num_new, start, num_logits, num_drafted, stage):
    """Prompts and their parts, or one token more and the draft after it."""
    token = NewTokens(0, ids(1), 5)
    assert stage_of([token, NewTokens(1, ids(num_new), start, num_logits, num_drafted)]) == stage


def test_chunks_cover_every_token_once(ids):
    """Equal lengths share calls up to the chunk size; long prompts are cut; nothing is lost."""
    lengths = (5, 5, 5, 70, 1, 1, 64)
    work = [NewTokens(i, ids(n), 0) for i, n in enumerate(lengths)]
    chunks = list(cut_chunks(work, 10))
    for row, length in enumerate(lengths):
        ranges = [(c.begin, c.end) for c in chunks if row in c.rows]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert [len(c.rows) for c in chunks if c.num_tokens == 5] == [2, 1]
    assert all(len(c.rows) * c.num_tokens <= 10 for c in chunks)


def test_rows_of_different_lengths_are_packed_where_they_may_be(ids):
    """In the order that is asked for, as many as fit in a chunk; what fits nowhere else, and what
    is equally long, goes as it does by itself.
    """
    lengths = (5, 3, 5, 70, 1, 9, 2, 2, 4)
    work = [NewTokens(i, ids(n), 100) for i, n in enumerate(lengths)]
    chunks = list(cut_chunks(work, 10, together=[(5, 4, 0, 3, 2), (6, 7)]))
    assert [(c.rows, c.lengths) for c in chunks if c.lengths] == [((5, 4), (9, 1))]
    chunks = list(cut_chunks(work, 12, together=[(5, 1, 0, 3, 4, 2)]))
    packed = [c for c in chunks if c.lengths]
    assert [(c.rows, c.lengths) for c in packed] == [((5, 1), (9, 3)), ((0, 4, 2), (5, 1, 5))]
    assert [(c.num_rows, c.num_tokens, c.begin) for c in packed] == [(1, 12, 0), (1, 11, 0)]
    assert packed[1].spans == [(0, 0, 5), (4, 0, 1), (2, 0, 5)]
    assert packed[1].positions(work).tolist() == [[*range(100, 105), 100, *range(100, 105)]]
    rest = [(c.rows, c.begin, c.end) for c in chunks if not c.lengths]
    assert rest == [
        *(((3,), begin, min(begin + 12, 70)) for begin in range(0, 70, 12)),
        ((6, 7), 0, 2),
        ((8,), 0, 4),
    ]


def test_tokens_that_go_one_by_one(ids):
    """Drafted ones, where the state before each is wanted, or all but those of a first call."""

    def cuts(*args, **options):
        found = list(cut_chunks(*args, **options))
        assert all(a.end == b.begin for a, b in itertools.pairwise(found))
        return [chunk.begin for chunk in found]

    work = [NewTokens(0, ids(7), 9, 5, num_drafted=4), NewTokens(1, ids(7), 9, 5, num_drafted=4)]
    assert cuts(work, 14) == [0]
    assert cuts(work, 14, steps="drafted") == [0, 3, 4, 5, 6]
    assert {chunk.rows for chunk in cut_chunks(work, 14, steps="drafted")} == {(0, 1)}
    assert cuts(work, 14, steps="all") == [*range(7)]
    prompt = [NewTokens(0, ids(9), 0, num_drafted=2)]
    assert cuts(prompt, 4, steps="drafted") == [0, 4, 7, 8]
    assert cuts(prompt, 4, steps="all") == [0, 4, 5, 6, 7, 8]
    assert cuts([NewTokens(0, ids(9), 0)], 20, steps="all") == [0]
