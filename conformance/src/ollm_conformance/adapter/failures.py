"""Checks of what goes wrong in a pass over several rows: each row is as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.broken_off import interrupt_at
from ollm_conformance.checks import check
from ollm_conformance.compare import refused, same_bits, same_tokens
from ollm_conformance.held import same_columns, same_lengths
from ollm_conformance.subject import Subject, generate, left_padded
from ollm_core import KVStore, ReadError
from ollm_core.testing import NewTokens, SequenceCache, StreamedModel, failing_reads, run_pass

_LOOK = "layout().mixer and other code of the adapter that keeps tokens or state beside the cache"
_TIERS = pytest.mark.parametrize("kv", ["device", "disk"])
_ROWS = ((110, 8), (37, 1), (0, 100), (61, 1))
"""Tokens that each row has, and tokens that it brings: a prompt after a past, a new one of two
chunks, and two rows that share a call.
"""
_STAGES = {"before the first layer": 0.0, "in the first layer": 0.15, "in the middle": 0.5}
_LATE_STAGES = {"in the last layer": 0.85, "after the head": 1.0}


class BatchFailure(AdapterSuite):
    """What goes wrong in a pass over several rows leaves no row torn."""

    @check(
        "failure.batch-cancelled",
        "Ctrl-C at any step of a pass over rows of different lengths, or in the middle of a padded "
        "`generate`, leaves every row of every layer as it was, and going on gives the bits and "
        "the tokens of a run without it.",
        look=_LOOK,
        needs=["batch"],
    )
    @_TIERS
    def test_batch_cancelled(self, subject: Subject, kv: str) -> None:
        with subject.open(kv=kv) as model:
            cache = model.new_cache()
            expected = run_pass(model, cache.store, _rows(subject, model, cache.store))
            work = _rows(subject, model, cache.store)
            for stage, part in (_STAGES | _LATE_STAGES).items():
                model.on_progress(interrupt_at(part))
                with refused(KeyboardInterrupt, f"Ctrl-C {stage}"):
                    run_pass(model, cache.store, work)
                model.on_progress(None)
                _same_rows(cache, work, f"after Ctrl-C {stage}")
            found = run_pass(model, cache.store, work)
            for row, (logits, wanted) in enumerate(zip(found, expected, strict=True)):
                same_bits(logits, wanted, f"logits of row {row} after Ctrl-C")
            cache.close()
            _generate_in_two(subject, model)

    @check(
        "failure.batch-read-error",
        "A read that fails at the start, in the middle or near the end of a pass over rows of "
        "different lengths is an error that leaves every row of every layer as it was, and going "
        "on gives the bits of a run without it.",
        look=_LOOK,
        needs=["batch"],
    )
    @_TIERS
    def test_batch_read_error(self, subject: Subject, kv: str) -> None:
        with subject.open(kv=kv) as model:
            model.keep_layers(device=0)  # so that every pass reads
            cache = model.new_cache()
            expected = run_pass(model, cache.store, _rows(subject, model, cache.store))
            work = _rows(subject, model, cache.store)
            for num_read in (0, len(cache) // 2, len(cache) - 1):
                with failing_reads(model):
                    _use_up_what_was_read(subject, model)
                with (
                    failing_reads(model, after=num_read),
                    refused(ReadError, f"read {num_read + 1} of a pass fails"),
                ):
                    run_pass(model, cache.store, work)
                _same_rows(cache, work, f"after read {num_read + 1} failed")
            found = run_pass(model, cache.store, work)
        for row, (logits, wanted) in enumerate(zip(found, expected, strict=True)):
            same_bits(logits, wanted, f"logits of row {row} after failed reads")


def _rows(subject: Subject, model: StreamedModel, store: KVStore) -> list[NewTokens]:
    """Work of `_ROWS` on new sequences, which have their pasts already."""
    prompts = [subject.prompt(sum(lengths), seed=row) for row, lengths in enumerate(_ROWS)]
    work = [
        NewTokens(store.new_sequence(), prompt[past:], past, min(num_new, 7))
        for prompt, (past, num_new) in zip(prompts, _ROWS, strict=True)
    ]
    pasts = [
        NewTokens(item.sequence, prompt[: item.start], 0)
        for item, prompt in zip(work, prompts, strict=True)
        if item.start
    ]
    run_pass(model, store, pasts)
    return work


def _same_rows(cache: SequenceCache, work: Sequence[NewTokens], when: str) -> None:
    """Each row of `work` must have its past in every layer, and nothing else."""
    sequences, starts = [item.sequence for item in work], [item.start for item in work]
    same_lengths(cache.store, sequences, starts, len(cache), when)


def _generate_in_two(subject: Subject, model: StreamedModel) -> None:
    """A padded `generate` that is broken off in its prompt and in a later step, and goes on, must
    give the tokens of one that is not.
    """
    ids, mask = left_padded([subject.prompt(n, seed=n) for n in (50, 9, 30)])
    length, num_new = ids.shape[1], 4
    whole = generate(model, ids, num_new, attention_mask=mask)
    for num_before in (0, 2):
        cache = model.new_cache()
        model.on_progress(interrupt_at(0.5, num_before))
        with refused(KeyboardInterrupt, f"Ctrl-C in pass {num_before + 1} of `generate`"):
            generate(model, ids, num_new, attention_mask=mask, past_key_values=cache)
        model.on_progress(None)
        what = f"`generate` broken off in pass {num_before + 1}"
        stored = length + num_before - 1 if num_before else 0
        same_columns(cache, mask, stored, what)
        given = whole[:, : stored + 1] if stored else ids
        grown = torch.nn.functional.pad(mask, (0, given.shape[1] - length), value=1)
        found = generate(
            model, given, whole.shape[1] - given.shape[1], attention_mask=grown,
            past_key_values=cache,
        )  # fmt: skip
        for row in range(len(ids)):
            same_tokens(found[row].tolist(), whole[row].tolist(), f"{what}: row {row}")
        cache.close()


def _use_up_what_was_read(subject: Subject, model: StreamedModel) -> None:
    """Run passes until a layer must be read, and cannot."""
    with contextlib.suppress(ReadError):
        for _ in range(3):
            model(input_ids=subject.prompt(1)[None])
