"""Faults that show only when one thing follows another, or in a place that nobody has named. Each
wraps `ollm.load`; the adapters are good.
"""

from __future__ import annotations

from broken import broken_adapter
from broken_caches import with_cache
from unseen_turns import turn_stores

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.recurrent.prefix_cache import PrefixCachingHybridStore


@with_cache
def drafting_stays_on(cache):
    """What is said on a cache after a drafted text is taken for a draft, with a state for each."""
    real = cache.activate_past_recording

    def activate():
        real()
        cache.__class__ = type("Drafting", (type(cache),), {"drafting": _ALWAYS})

    cache.activate_past_recording = activate


_ALWAYS = property(lambda self: True, lambda self, value: None)


class _KeepsNoForks:
    def fork(self, sequence, num_tokens=None):
        forked = super().fork(sequence, num_tokens)
        self._ends.pop(forked)
        return forked


def states_of_forks_not_kept(*args, **options):
    """Nobody finds again what was copied last."""
    model = ollm.load(*args, **options)
    turn_stores(model, PrefixCachingHybridStore, _KeepsNoForks)
    return model


def rows_in_the_order_they_came(*args, **options):
    """A pass takes its rows by the age of their sequences, and gives their logits so."""
    model = ollm.load(*args, **options)
    real = model.engine.run
    model.engine.run = lambda store, work: real(store, sorted(work, key=lambda one: one.sequence))
    return model


@with_cache
def forks_take_a_few_more(cache):
    """A fork a little before the end is one at the end."""
    store, real = cache.store, cache.store.fork

    def fork(sequence, num_tokens=None):
        length = store.num_tokens(sequence)
        near = num_tokens is not None and length - num_tokens < 4
        return real(sequence, length if near else num_tokens)

    store.fork = fork


@with_cache
def second_release_takes_the_next(cache):
    """A sequence that is released twice takes the one after it along."""
    store, real, released = cache.store, cache.store.release, set()

    def release(sequence):
        real(sequence + 1 if sequence in released else sequence)
        released.add(sequence)

    store.release = release


def _unchecked(which):
    """A load that takes blocks on disk unchecked, where `which(disk, layer_idx, slots)` says so."""

    class Unchecked:
        def _read_slots(self, layer_idx, slots, buffer):
            keys = [(layer_idx, slot) for slot in which(self, layer_idx, slots)]
            known = {key: self.checksums.pop(key) for key in keys if key in self.checksums}
            try:
                super()._read_slots(layer_idx, slots, buffer)
            finally:
                self.checksums.update(known)

    def load(*args, **options):
        model = ollm.load(*args, **options)
        turn_stores(model, DiskKVStore, Unchecked, "_disk")
        return model

    return load


last_of_a_read_not_checked = _unchecked(lambda disk, layer_idx, slots: slots[-1:])
last_of_a_read_not_checked.__name__ = "last_of_a_read_not_checked"
second_layer_not_checked = _unchecked(
    lambda disk, layer_idx, slots: slots if layer_idx == 1 else ()
)
second_layer_not_checked.__name__ = "second_layer_not_checked"


def _llama(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


def _recurrent(check, sentence, load):
    return broken_adapter(check, sentence, Qwen3NextAdapter, load=load)


BROKEN_WALKS = [
    _llama("walk.rows", "After a drafted text all is a draft.", drafting_stays_on),
    _recurrent("walk.rows", "States of copied rows are not kept.", states_of_forks_not_kept),
    _llama("walk.sequences", "Logits come in another order.", rows_in_the_order_they_came),
    _llama("walk.sequences", "A fork takes a few more tokens.", forks_take_a_few_more),
    _llama("walk.sequences", "A second release hits another.", second_release_takes_the_next),
    _llama("walk.damage", "The last block of a read is not checked.", last_of_a_read_not_checked),
    _llama("walk.damage", "The second layer is not checked.", second_layer_not_checked),
]
