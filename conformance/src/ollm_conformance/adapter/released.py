"""Checks of sequences that are forked, cut, released and used again in any order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.checks import check
from ollm_conformance.compare import refused, same_within
from ollm_conformance.held import same_lengths
from ollm_conformance.subject import Subject
from ollm_core import DoesNotFitError
from ollm_core.testing import NewTokens, SequenceCache, StreamedModel, run_pass

_LOOK = "caches(): kind, window and states of each layer; layout().mixer must keep nothing of a row"
_TIERS = pytest.mark.parametrize("kv", ["device", "disk"])


class Released(AdapterSuite):
    """Rows come and go, and leave nothing."""

    @check(
        "caches.released",
        "Rows that are copied, picked, cut, reset and used again, and forks that outlive what they "
        "were made of, have the tokens that they should, and once they are released the memory "
        "accounts are back where they were.",
        look=_LOOK,
        needs=["batch", "truncate"],
    )
    @_TIERS
    def test_released(self, subject: Subject, kv: str) -> None:
        with subject.open(kv=kv) as model:
            model(input_ids=subject.prompt(8)[None])
            before = _used(model)
            cache = model.new_cache()
            empty = _used(model)
            _rows_in_turn(subject, model, cache)
            _too_many_rows(subject, model, cache)
            cache.reset()
            _same_use(model, empty, "after reset")
            _forks(subject, model, cache)
            _same_use(model, empty, "after every sequence was released")
            prompt = subject.prompt(20, seed=9)
            found = model(input_ids=prompt[None], past_key_values=cache).logits[0]
            same_within(found, subject.reference().run(prompt), 1e-4, "logits in a used cache")
            cache.close()
            cache.close()
            _same_use(model, before, "after close")


def _rows_in_turn(subject: Subject, model: StreamedModel, cache: SequenceCache) -> None:
    """What transformers does to the rows of a batch, in an odd order."""
    rows = _Rows(subject, model, cache, [[]])
    rows.go_on(24)
    cache.batch_repeat_interleave(3)
    rows.pick([0, 0, 0])
    rows.go_on(4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    rows.pick([2, 0])
    rows.go_on(3)
    cache.batch_select_indices(torch.tensor([True, True]))
    rows.pick([0, 1])
    rows.go_on(2)
    cache.batch_select_indices(torch.tensor([False, True]))
    rows.pick([1])
    cache.batch_repeat_interleave(2)
    rows.pick([0, 0])
    rows.go_on(3)
    cache.crop(-3)
    rows.cut()
    cache.reorder_cache(torch.tensor([1, 1]))
    rows.pick([1, 1])
    rows.go_on(5)
    cache.reorder_cache(torch.tensor([1, 0]))
    rows.pick([1, 0])
    rows.go_on(2, "after rows were copied, picked, cut and exchanged")


def _too_many_rows(subject: Subject, model: StreamedModel, cache: SequenceCache) -> None:
    """Copies of rows that there is no memory for are refused, and leave things as they were."""
    before, rows = _used(model), [*cache.rows]
    lengths = [cache.num_tokens(row) for row in range(len(rows))]
    copy = cache.store.fork(rows[0])
    one = [now - then for now, then in zip(_used(model), before, strict=True)]
    cache.store.release(copy)
    _same_use(model, before, "after a fork was made and released")
    accounts = model.accounts.device, model.accounts.host
    limits = [account.limit for account in accounts]
    for account, size in zip(accounts, one, strict=True):
        account.limit = account.used + 2 * size
    with refused(DoesNotFitError, "copies of rows that there is no memory for"):
        cache.batch_repeat_interleave(3)
    for account, limit in zip(accounts, limits, strict=True):
        account.limit = limit
    _same_use(model, before, "after copies of rows were refused")
    what = "after copies of rows were refused"
    assert cache.rows == rows, f"{what}: expected the rows {rows} from before, got {cache.rows}"
    same_lengths(cache.store, rows, lengths, len(cache), what)


def _forks(subject: Subject, model: StreamedModel, cache: SequenceCache) -> None:
    """A fork outlives its origin, which is cut and goes another way; sequences are released in the
    middle of others, and twice. The prompt is longer than a block, which all share.
    """
    store = cache.store
    prompt = subject.prompt(270)
    tails = [subject.prompt(6, seed=seed) for seed in range(1, 5)]
    origin = store.new_sequence()
    _run(model, cache, {origin: [prompt[:260]]})
    _run(model, cache, {origin: [prompt[:260], prompt[260:]]})
    fork = store.fork(origin)
    store.truncate(origin, 260)
    texts = {origin: [prompt[:260], tails[0]], fork: [prompt[:260], prompt[260:], tails[1]]}
    _right(subject, _run(model, cache, texts), texts, "an origin that was cut after its fork")
    store.release(origin)
    second, third = store.fork(fork), store.fork(fork)
    store.release(origin)
    store.release(second)
    text = texts[fork]
    texts = {third: [*text, tails[2]], fork: [*text, tails[3]]}
    _right(subject, _run(model, cache, texts), texts, "forks that outlive others")
    store.release(third)
    store.release(third)
    texts = {fork: [*texts[fork], tails[0]]}
    _right(subject, _run(model, cache, texts), texts, "a fork that is left alone")
    store.release(fork)


_Text = list[Tensor]
"""Tokens in the pieces in which they came: where a text was cut into calls changes its bits."""


def _run(model: StreamedModel, cache: SequenceCache, texts: dict[int, _Text]) -> list[Tensor]:
    """Logits [t, V] of the last piece of each sequence's text, which has those before."""
    work = [
        NewTokens(sequence, text[-1], sum(map(len, text[:-1])), len(text[-1]))
        for sequence, text in texts.items()
    ]
    return run_pass(model, cache.store, work)


def _right(subject: Subject, found: Sequence[Tensor], texts: dict[int, _Text], what: str) -> None:
    """Logits of the last piece of each text must be those of the text alone. The first piece is the
    same in all.
    """
    reference = subject.reference()
    begun = reference.new_cache()
    reference.run(next(iter(texts.values()))[0], cache=begun)
    for row, (logits, text) in enumerate(zip(found, texts.values(), strict=True)):
        cache = copy.deepcopy(begun)
        expected = [reference.run(piece, cache=cache) for piece in text[1:]][-1]
        same_within(logits, expected, 1e-4, f"{what}: logits of row {row}")


@dataclass
class _Rows:
    """The rows of a batch as they should be, beside the cache that has them."""

    subject: Subject
    model: StreamedModel
    cache: SequenceCache
    texts: list[_Text]
    num_given: int = 0

    def go_on(self, num_new: int, what: str = "") -> None:
        """Bring so many new tokens to each row, others to each. With `what`, compare the logits."""
        for row, text in enumerate(self.texts):
            self.texts[row] = [*text, self.subject.prompt(num_new, seed=self.num_given + row)]
        self.num_given += len(self.texts)
        new = torch.stack([text[-1] for text in self.texts])
        found = self.model(input_ids=new, past_key_values=self.cache).logits
        if what:
            _right(self.subject, list(found), dict(enumerate(self.texts)), what)

    def pick(self, rows: list[int]) -> None:
        """Let the rows be those."""
        self.texts = [self.texts[row] for row in rows]

    def cut(self) -> None:
        """Drop the last piece of each."""
        self.texts = [text[:-1] for text in self.texts]


def _used(model: StreamedModel) -> tuple[int, int]:
    """Bytes that the accounts of device and host say are used."""
    return model.accounts.device.used, model.accounts.host.used


def _same_use(model: StreamedModel, expected: tuple[int, int], when: str) -> None:
    for name, wanted, found in zip(("device", "host"), expected, _used(model), strict=True):
        assert found == wanted, (
            f"{name} memory {when}: expected {wanted} bytes to be used as before, got {found}"
        )
