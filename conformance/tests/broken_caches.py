"""Opened models whose caches are wrong in one way."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace

from broken import broken_adapter

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_core.checkpoint.safetensors import open_checkpoint


def kv_never_on_disk(*args, **options):
    kv = "host" if options.get("kv") == "disk" else options.get("kv", "auto")
    return ollm.load(*args, **{**options, "kv": kv})


def keyed_by_a_sample(directory, **options):
    """The first and last 512 bytes of every tensor stand for the weights."""
    model = ollm.load(directory, **options)

    def sampled():
        digest = hashlib.sha256()
        for tensor in open_checkpoint(directory).tensors.values():
            raw = tensor.path.read_bytes()[tensor.offset :][: tensor.num_bytes]
            digest.update(raw[:512] + raw[-512:])
        return digest.hexdigest()

    opener = model._open_store
    opener._request = replace(opener._request, fingerprint=sampled)
    return model


def with_cache(change):
    """A load whose every cache is changed."""

    @functools.wraps(change)
    def load(*args, **options):
        model = ollm.load(*args, **options)
        real = model.new_cache

        def new_cache(*cache_args, **cache_options):
            cache = real(*cache_args, **cache_options)
            change(cache)
            return cache

        model.new_cache = new_cache
        return model

    return load


@with_cache
def truncate_rounds_up(cache):
    """Short cuts are not made."""
    real = cache.store.truncate

    def truncate(sequence, num_tokens):
        dropped = cache.store.num_tokens(sequence) - num_tokens
        if dropped > 4 or dropped == 0:
            real(sequence, num_tokens)

    cache.store.truncate = truncate


@with_cache
def truncate_one_short(cache):
    real = cache.store.truncate
    cache.store.truncate = lambda sequence, n: real(
        sequence, min(n + 1, cache.store.num_tokens(sequence))
    )


@with_cache
def fork_shares(cache):
    """Both rows write to one sequence."""

    def repeat(repeats):
        cache.rows = cache.rows * repeats
        cache.kept = cache.kept * repeats

    cache.batch_repeat_interleave = repeat


@with_cache
def reorder_forgotten(cache):
    cache.reorder_cache = lambda beam_idx: None


@with_cache
def blocks_reversed(cache):
    real = cache.store.blocks
    cache.store.blocks = lambda *args, **options: reversed(
        [(k.clone(), v.clone()) for k, v in real(*args, **options)]
    )


def second_turn_forgets(*args, **options):
    model = ollm.load(*args, **options)
    real = model.generate

    def generate(ids, past_key_values=None, **rest):
        return real(ids, **rest)

    model.generate = generate
    return model


def keeps_nothing(*args, **options):
    return ollm.load(*args, **{**options, "keep_kv": False})


def kv_in_twice_the_bytes(*args, **options):
    model = ollm.load(*args, **options)
    real = model.new_cache

    def new_cache(*cache_args, **cache_options):
        cache = real(*cache_args, **cache_options)
        cache.more = cache.store.new_sequence()
        cache.store.reserve(cache.more, 4096)
        return cache

    model.new_cache = new_cache
    return model


def _broken(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


BROKEN_CACHES = [
    _broken("caches.reopen", "KV on disk is not found again.", keeps_nothing),
    _broken("caches.tiers", "KV never goes to disk.", kv_never_on_disk),
    _broken("caches.tiers", "KV blocks come in the wrong order.", blocks_reversed),
    _broken("caches.truncate", "Truncating leaves a token.", truncate_one_short),
    _broken("drafts.verify", "State is not restored after a rejected draft.", truncate_rounds_up),
    _broken("caches.fork", "A fork writes into its source.", fork_shares),
    _broken("caches.fork", "Rows are not reordered.", reorder_forgotten),
    _broken("caches.second-turn", "The second turn forgets the first.", second_turn_forgets),
    _broken("caches.bytes", "KV takes more memory than its tokens.", kv_in_twice_the_bytes),
    _broken("caches.other-weights", "KV is keyed by a sample of the weights.", keyed_by_a_sample),
]
