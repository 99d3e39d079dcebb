"""Promise 2, of memory that no account knows: the process against the accounts, and what sequences
leave behind.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ollm_conformance.adapter.base import AdapterSuite
from ollm_conformance.allocated import live_bytes, only_new_objects
from ollm_conformance.checks import check
from ollm_conformance.process_memory import process_bytes, resident_bytes
from ollm_conformance.subject import Subject
from ollm_core import KVStore
from ollm_core.testing import StreamedModel, supports

_VOCABULARY = 50_000
_SLACK = 4 << 20  # where the system gives huge pages, a buffer may take two MiB more
_GROWN_IN_PROCESS = 3 << 19
_GROWN_IN_PYTHON = 64 << 10
_ROUNDS = 2
_TIERS = pytest.mark.parametrize("kv", ["device", "disk"])
_LOOK = "weights(): transforms that keep what they are given; a KV store or a streamer of your own"


class Hidden(AdapterSuite):
    """What is allocated past torch, or past the accounts."""

    @check(
        "memory.hidden",
        "While a model runs and between its passes, the process has no more memory than the "
        "accounts of device and host say, whether torch, numpy or Python took it, or a mapping.",
        look=_LOOK,
    )
    @_TIERS
    def test_hidden(self, subject: Subject, kv: str) -> None:
        changes = {"vocab_size": _VOCABULARY} if "vocab_size" in subject.config else {}
        directory = subject.tiny("bfloat16", changes=changes)
        over = [_Excess(), _Excess()]  # what is hidden is there in both rounds, noise is not
        with only_new_objects():
            for excess in over:
                self._run(subject, directory, kv, excess)
                gc.collect()
        least = min(over, key=lambda excess: excess.num_bytes)
        assert least.num_bytes <= _SLACK, (
            f"KV on {kv}, {least.where}: expected at most the {least.told} bytes of the accounts "
            f"and {_SLACK} more, got {least.num_bytes} more"
        )

    @staticmethod
    def _run(subject: Subject, directory: Path, kv: str, excess: _Excess) -> None:
        """Passes, and more KV than they make, looked at on the way."""
        excess.begin()
        with subject.open(directory, kv=kv, reader="direct") as model:
            model.on_progress(lambda _: excess.look(model, "in a pass"))
            cache = model.new_cache()
            for ids in subject.prompt(301).split([200, 100, 1]):
                wanted = 0 if len(ids) == 100 else 1  # 0 is all
                model(input_ids=ids[None], past_key_values=cache, logits_to_keep=wanted)
                excess.look(model, "after a pass")
            _fill(cache.store, subject, num_sequences=12)
            excess.look(model, "with KV of 12 sequences")
            cache.close()

    @check(
        "memory.sequences",
        "Sequences that are made, extended, forked, cut, released, reset and closed leave nothing "
        "behind, however often: no tensor, no Python memory, no mapping, no charge of an account.",
        look=_LOOK,
    )
    @_TIERS
    def test_sequences(self, subject: Subject, kv: str) -> None:
        with only_new_objects(), subject.open(subject.tiny("bfloat16"), kv=kv) as model:
            _round(model, subject)
            tracemalloc.start(1)
            try:
                _round(model, subject)
                before = _held(model)
                for _ in range(_ROUNDS):
                    _round(model, subject)
                after = _held(model)
            finally:
                tracemalloc.stop()
        for what, allowed in (
            ("tensors", 0),
            ("accounts", 0),
            ("python", _GROWN_IN_PYTHON),
            ("process", _GROWN_IN_PROCESS),
        ):
            grown = after[what] - before[what]
            assert grown <= allowed, (
                f"KV on {kv}, bytes of {what}: expected at most {allowed} more after {_ROUNDS} "
                f"more rounds of sequences, got {grown}"
            )


@dataclass(slots=True)
class _Excess:
    """The most that the process had beyond the accounts, and when; 0 up to what is allowed."""

    num_bytes: int = 0
    told: int = 0
    where: str = ""
    _before: int = 0

    def begin(self) -> None:
        self._before = process_bytes()

    def look(self, model: StreamedModel, where: str) -> None:
        told = model.accounts.device.used + model.accounts.host.used
        if resident_bytes() - self._before - told <= max(self.num_bytes, _SLACK):
            return  # and less without what is free
        excess = process_bytes() - self._before - told
        if excess > self.num_bytes:
            self.num_bytes, self.told, self.where = excess, told, where


def _held(model: StreamedModel) -> dict[str, int]:
    """Bytes that there are between passes, told by whom they are known to."""
    gc.collect()
    return {
        "tensors": live_bytes(),
        "accounts": model.accounts.device.used + model.accounts.host.used,
        "python": tracemalloc.get_traced_memory()[0],
        "process": process_bytes(),
    }


def _round(model: StreamedModel, subject: Subject) -> None:
    """Everything that can happen to sequences."""
    prompt, able = subject.prompt(270), _able(subject)
    cache = model.new_cache()
    model(input_ids=prompt[None], past_key_values=cache)
    if able("batch"):
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
    rows = torch.stack([prompt[:4]] * len(cache.rows))
    model(input_ids=rows, past_key_values=cache, logits_to_keep=1)
    if able("truncate"):
        cache.crop(-4)  # to where the pass began: recurrent layers go nowhere else
    model(input_ids=rows[:, :1], past_key_values=cache, logits_to_keep=1)
    cache.reset()
    model(input_ids=prompt[None, :20], past_key_values=cache, logits_to_keep=1)
    _fill(cache.store, subject, num_sequences=2, then=_fork_and_cut if able("batch") else None)
    cache.close()
    model(input_ids=prompt[None, :5])


def _able(subject: Subject) -> Callable[[str], bool]:
    return lambda capability: supports(subject.adapter, capability)


def _fill(
    store: KVStore,
    subject: Subject,
    num_sequences: int,
    then: Callable[[KVStore, int], None] | None = None,
) -> None:
    """Let sequences of a store have keys and values of 1,024 tokens each."""
    kinds = subject.adapter.caches(subject.config)
    for _ in range(num_sequences):
        sequence = store.new_sequence()
        for layer_idx, kind in enumerate(kinds):
            if kind.has_keys:
                shape = kind.num_kv_heads, 1024, kind.head_dim
                keys = torch.zeros(shape, dtype=torch.bfloat16)
                store.append(layer_idx, sequence, keys, keys)
        if then is not None and all(kind.kind == "full" and not kind.states for kind in kinds):
            then(store, sequence)


def _fork_and_cut(store: KVStore, sequence: int) -> None:
    """Then leave nothing of either."""
    forked = store.fork(sequence, 900)
    store.truncate(forked, 700)
    store.release(sequence)
    store.release(forked)
