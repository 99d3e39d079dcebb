"""Caches of the first round of unseen mutants (unseen_a.py), each with one fault."""

from __future__ import annotations

import functools
from dataclasses import replace

from unseen_turns import turn, turn_stores

import ollm
from ollm_core.generate.causal_lm import StreamedModel
from ollm_core.kv.block_store import BlockKVStore
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import MemoryStorage
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.model.fingerprint import identity


class SharesWithoutOwning:
    def share(self, layer_idx, source, table, num_tokens):
        super().share(layer_idx, source, table, num_tokens)
        if self._geometry.kinds[layer_idx].window is not None:
            num_full = num_tokens // self._block_size
            shared = [block for i, block in table.blocks.items() if i < num_full]
            self._num_sharers.subtract((layer_idx, block) for block in shared)


# Hurts: beam search after a prompt of more than a block: a beam that is dropped takes the windows
# of the others with it.
def forks_do_not_own_windows(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, BlockKVStore, SharesWithoutOwning, "_manager")
    return model


class UnsealsNothing:
    def unseal(self, layer_idx, block, tail):
        self._forget(layer_idx, block)


# Hurts: with KV on disk, a draft that is rejected, or a crop, across the end of a block: what the
# block held is zeros from then on.
def unseals_nothing_on_disk(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, DiskKVStore, UnsealsNothing, "_disk")
    return model


class ComparesABit:
    def _matches(self, token_ids):
        found = []
        for pin in self._pins:
            shorter = min(len(pin.token_ids), len(token_ids))
            other = (pin.token_ids[:shorter] != token_ids[:shorter]).nonzero().flatten()
            other = other[other % self.block_size < 64]
            found.append((pin, int(other[0]) if len(other) else shorter))
        return sorted(found, key=lambda one: one[1], reverse=True)


# Hurts: the same document with one word changed in a later part of a block: answers are about the
# old one.
def compares_the_start_of_each_block(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, PrefixCachingStore, ComparesABit)
    return model


# Hurts: whoever changes rope_scaling or rope_theta in config.json and asks about the same document
# again: its keys are those of the old config.
def knows_models_by_weights_alone(*args, **options):
    model = ollm.load(*args, **options)
    checkpoint = model.engine._check_files.__self__
    request = model._open_store._request
    name = functools.partial(identity, checkpoint, {})
    model._open_store._request = replace(request, fingerprint=name)
    return model


class ForksTheSameState:
    def fork(self, sequence, forked, num_tokens):
        super().fork(sequence, forked, num_tokens)
        if num_tokens:
            for layer_idx, layer in self._sequences[sequence].layers.items():
                copied = self._sequences[forked].layers[layer_idx]
                copied.at[num_tokens] = layer.at[num_tokens]


# Hurts: two questions on one document: from the second token of one answer on, the other goes on
# from its state.
def forks_share_their_states(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, HybridKVStore, ForksTheSameState, "_states")
    return model


class AlignsLeft:
    def put_state(self, layer_idx, sequence, num_new, state):
        convolution, recurrent = state
        begins = self.num_tokens(sequence, layer_idx) == 0
        if begins and num_new < convolution.shape[-1]:
            convolution = convolution.roll(num_new, -1)
        super().put_state(layer_idx, sequence, num_new, (convolution, recurrent))


# Hurts: a prompt of one to three tokens, fewer than the convolution's kernel: a base model that
# goes on from "The".
def short_prompts_lie_on_the_left(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, HybridKVStore, AlignsLeft, "_states")
    return model


class ForgetsItsCaches:
    @functools.wraps(StreamedModel.new_cache)
    def new_cache(self, *args, **options):
        cache = super().new_cache(*args, **options)
        self._belongings.caches.remove(cache.finalizer)
        return cache


# Hurts: a program that closes the model and still has the cache of a chat: its KV stays in memory,
# or on disk, where it is the user's text.
def caches_outlive_the_model(*args, **options):
    model = ollm.load(*args, **options)
    turn(model, ForgetsItsCaches)
    return model


class GivesBackTwice:
    def free(self, layer_idx, blocks):
        super().free(layer_idx, blocks)
        self._charges.give("kv blocks", len(blocks) * self._block_bytes(layer_idx))


# Hurts: beam search, windows, and drafts that are rejected: with each block that is freed, the
# budget grows by one.
def frees_blocks_twice(*args, **options):
    model = ollm.load(*args, **options)
    open_store = model._open_store

    def opened(*args):
        tier, store = open_store(*args)
        storage = getattr(getattr(store, "_attention", store), "_storage", None)
        if isinstance(storage, MemoryStorage):
            turn(storage, GivesBackTwice)
        return tier, store

    model._open_store = opened
    return model


class ReordersInPlace:
    def reorder_cache(self, beam_idx):
        self.kept = [self.kept[source] for source in beam_idx.tolist()]
        for row, source in enumerate(beam_idx.tolist()):
            if row != source:
                forked = self.store.fork(self.rows[source])
                self.store.release(self.rows[row])
                self.rows[row] = forked


class OpensSuchCaches:
    @functools.wraps(StreamedModel.new_cache)
    def new_cache(self, *args, **options):
        cache = super().new_cache(*args, **options)
        turn(cache, ReordersInPlace)
        return cache


# Hurts: beam search, at each step where two beams change places, or one moves down that was
# replaced just before.
def reorders_beams_in_place(*args, **options):
    model = ollm.load(*args, **options)
    turn(model, OpensSuchCaches)
    return model


class ChecksTheFirstSlot:
    def _read_slots(self, layer_idx, slots, buffer):
        keys = [(layer_idx, slot) for slot in slots[1:] if (layer_idx, slot) in self.checksums]
        rest = {key: self.checksums.pop(key) for key in keys}
        try:
            super()._read_slots(layer_idx, slots, buffer)
        finally:
            self.checksums.update(rest)


# Hurts: a flipped bit in kept KV, in any block but the first of those that are read together: it is
# believed.
def checks_the_first_block_of_a_read(*args, **options):
    model = ollm.load(*args, **options)
    turn_stores(model, DiskKVStore, ChecksTheFirstSlot, "_disk")
    return model
