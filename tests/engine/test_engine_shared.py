"""Sequences that were forked from one document: what they share is read once in a pass, their
tokens are those of passes that read it for each, and memory is as planned.
"""

from __future__ import annotations

import pytest
import torch

import ollm
from ollm_core import DoesNotFitError
from ollm_core.engine.batch import NewTokens
from ollm_core.memory.tracker import AllocationTracker

DOCUMENT = 4 * 256 + 40


def forked(model, store, ids, num_rows, length=DOCUMENT):
    """Sequences that have one document."""
    document = store.new_sequence()
    model.engine.run(store, [NewTokens(document, ids(length), 0)])
    return [store.fork(document) for _ in range(num_rows)]


def decoded(model, store, rows, ids, num_new, lengths):
    """Greedy tokens of each row after a question of its own, of one of `lengths`, and KV bytes read
    by each pass.
    """
    work = [
        NewTokens(sequence, ids(lengths[row % len(lengths)], seed=row + 1), DOCUMENT)
        for row, sequence in enumerate(rows)
    ]
    found, num_read = [[] for _ in rows], []
    for _ in range(num_new):
        before = store.bytes_read
        logits = model.engine.run(store, work)
        num_read.append(store.bytes_read - before)
        for tokens, row in zip(found, logits, strict=True):
            tokens.append(int(row[-1].argmax()))
        work = [
            NewTokens(item.sequence, torch.tensor(tokens[-1:]), item.start + len(item.token_ids))
            for item, tokens in zip(work, found, strict=True)
        ]
    return found, num_read


@pytest.mark.parametrize("kv", ["device", "disk"])
@pytest.mark.parametrize("lengths", [(1,), (5,), (3, 41)])
def test_tokens_are_those_of_rows_that_read_alone(tiny, ids, tmp_path, kv, lengths):
    """Steps, drafts and questions, in memory and on disk, where a step reads the document once."""
    with ollm.load(tiny, device="cpu", kv_dir=tmp_path, attention="blockwise") as model:
        runs = {}
        for shares in (True, False):
            cache = model.new_cache(kv)
            store = cache.store
            if not shares:
                store.shared_runs = lambda *_: ()
            rows = forked(model, store, ids, 5)
            runs[shares] = decoded(model, store, rows, ids, 12, lengths)
            cache.close()
        alone = model.new_cache(kv)
        for row, tokens in enumerate(runs[True][0]):
            (sequence,) = forked(model, alone.store, ids, 1)
            question = ids(lengths[row % len(lengths)], seed=row + 1)
            work = NewTokens(sequence, question, DOCUMENT)
            first = int(model.engine.run(alone.store, [work])[0][-1].argmax())
            assert first == tokens[0]
    assert runs[True][0] == runs[False][0]
    if kv == "disk":
        for shared, apart in zip(runs[True][1], runs[False][1], strict=True):
            assert 0 < 4.9 * shared < apart


@pytest.mark.parametrize(
    ("dtype", "kv", "lengths"),
    [
        ("float32", "device", (1,)),
        ("float32", "device", (20,)),
        ("float32", "disk", (60, 33, 1)),
        ("bfloat16", "device", (1, 5, 12, 3)),
        ("bfloat16", "disk", (1,)),
        ("bfloat16", "disk", (3,)),
    ],
)
def test_planned_activations_cover_the_real_ones(make_llama, ids, tmp_path, dtype, kv, lengths):
    """What torch really allocates in a pass is at most what was planned, and at least 60% of it."""
    length = 9 * 256 + 40
    wide = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 40,
            "num_attention_heads": 16, "head_dim": 64}  # fmt: skip
    directory = make_llama(getattr(torch, dtype), **wide)
    with ollm.load(
        directory, device="cpu", device_memory="200MB", kv_dir=tmp_path, attention="blockwise"
    ) as model:
        cache = model.new_cache(kv)
        store = cache.store
        rows = forked(model, store, lambda n: ids(n) % 40, 6, length)
        work = [
            NewTokens(sequence, ids(lengths[row % len(lengths)], seed=row) % 40, length)
            for row, sequence in enumerate(rows)
        ]
        with model.engine._pass_planner.admit(store, work) as plan:
            pass
        assert plan.shares
        assert len(plan.chunks) == 1
        before = store.tier_bytes()
        with AllocationTracker("cpu") as tracker:
            model.engine.run(store, work)
        after = store.tier_bytes()
        growth = after.device + after.host - before.device - before.host
    assert tracker.peak <= plan.needed.device + growth
    block = store.geometry.block_bytes(0)  # a plan counts one that is looked at
    assert tracker.peak >= 0.7 * (plan.needed.device - block)


def test_a_pass_for_which_sharing_takes_too_much_reads_for_each_row(make_llama, ids):
    """No pass is refused for what sharing takes."""
    directory = make_llama(num_attention_heads=16, head_dim=64, num_hidden_layers=1)

    def run(num_bytes, shares=True):
        options = {"device": "cpu", "device_memory": num_bytes, "kv": "host"}
        with ollm.load(directory, attention="blockwise", chunk_size=64, **options) as model:
            cache = model.new_cache()
            store = cache.store
            document = store.new_sequence()
            model.engine.run(store, [NewTokens(document, ids(300), 0)])
            work = [NewTokens(store.fork(document), ids(1, seed=row), 300) for row in range(16)]
            if not shares:
                store.shared_runs = lambda *_: ()
            plan, _ = model.engine._pass_planner.choose(store, work)
            tokens = [int(row.argmax()) for row in model.engine.run(store, work)]
            return plan.shares, tokens, model.stats.device_peak_bytes

    most, least = 64_000_000, 100_000
    while most - least > 1000:
        middle = (most + least) // 2
        try:
            run(middle, shares=False)
            most = middle
        except DoesNotFitError:
            least = middle
    shared, tokens, _ = run(64_000_000)
    assert shared
    assert run(most)[:2] == (False, tokens)
    assert run(most)[2] <= most


def test_exact_attention_has_its_bits(tiny, ids):
    """Forks of a document give what sequences that read it themselves do."""
    with ollm.load(tiny, device="cpu", attention="exact", chunk_size=256) as model:
        cache = model.new_cache("device")
        store = cache.store
        rows = forked(model, store, ids, 3)
        work = [NewTokens(row, ids(1, seed=n), DOCUMENT) for n, row in enumerate(rows)]
        found = model.engine.run(store, work)
        apart = [forked(model, store, ids, 1)[0] for _ in rows]
        work = [NewTokens(row, ids(1, seed=n), DOCUMENT) for n, row in enumerate(apart)]
        store.shared_runs = lambda *_: ()
        for one, other in zip(found, model.engine.run(store, work), strict=True):
            assert torch.equal(one, other)


def test_layers_that_do_not_share_alike_read_for_each_row(tiny, ids):
    """As an error may leave them, which cut some layers and not the others."""
    with ollm.load(tiny, device="cpu", attention="blockwise") as model:
        cache = model.new_cache("device")
        store = cache.store
        rows = forked(model, store, ids, 3)
        real = store.shared_runs
        store.shared_runs = lambda layer_idx, *asked: real(layer_idx, *asked) if layer_idx else ()
        for lengths in ((1, 1, 1), (4, 9, 2)):
            work = [NewTokens(row, ids(n), DOCUMENT) for row, n in zip(rows, lengths, strict=True)]
            plan, _ = model.engine._pass_planner.choose(store, work)
            assert not plan.shares
            assert not any(chunk.lengths for chunk in plan.chunks)


def test_questions_are_one_call_and_several_logits_come_back(tiny, ids):
    """Packed rows, in chunks of what fits, give the logits that were asked for, in order."""
    lengths, wanted = (30, 7, 1, 60, 12, 33), (1, 7, 1, 5, 2, 33)
    with ollm.load(tiny, device="cpu", attention="blockwise", chunk_size=96) as model:
        cache = model.new_cache("device")
        store = cache.store
        rows = forked(model, store, ids, len(lengths))
        work = [
            NewTokens(row, ids(n, seed=n), DOCUMENT, num_logits)
            for row, n, num_logits in zip(rows, lengths, wanted, strict=True)
        ]
        plan, _ = model.engine._pass_planner.choose(store, work)
        assert [chunk.lengths for chunk in plan.chunks] == [(30, 7, 1), (60, 12), ()]
        found = model.engine.run(store, work)
        for item, n, logits in zip(work, wanted, found, strict=True):
            assert store.num_tokens(item.sequence) == DOCUMENT + len(item.token_ids)
            assert len(logits) == n
            (alone,) = forked(model, store, ids, 1)
            one = NewTokens(alone, item.token_ids, DOCUMENT, n)
            assert (model.engine.run(store, [one])[0] - logits).abs().max() < 1e-4
