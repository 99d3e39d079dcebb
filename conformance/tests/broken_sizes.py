"""What goes wrong at sizes that tiny runs do not reach: many positions, the edges of a
window, passes of few tokens.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch
from broken import broken_adapter
from broken_caches import with_cache
from families import GptOss, GraniteOne, GraniteSmall, Qwen3

import ollm
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import KVStoreError
from ollm_core.attention.select import find_attention
from ollm_core.engine import layer_call


def _with_positions(change):
    """A load whose rotary embeddings get other positions than those that are meant."""

    def load(*args, **options):
        model = ollm.load(*args, **options)
        rotary = model.engine._skeleton.rotary
        real = rotary.forward
        rotary.forward = lambda hidden, positions: real(hidden, change(positions))
        return model

    return load


def _with_attention(change, only="blockwise"):
    """A load whose attention is `change(real)`, where attention is `only`."""

    def load(*args, **options):
        model = ollm.load(*args, **options)
        real = model.engine._run

        def run(*parts):
            with patch.object(
                layer_call, "find_attention", lambda *of: change(find_attention(*of))
            ):
                return real(*parts)

        if options.get("attention") == only:
            model.engine._run = run
        return model

    return load


def positions_in_bfloat16(*args, **options):
    """Above 2,048, where a step of bfloat16 is 16."""
    return _with_positions(
        lambda positions: torch.where(positions > 2048, positions.bfloat16().long(), positions)
    )(*args, **options)


def positions_cut_at_4096(*args, **options):
    return _with_positions(lambda positions: positions.clamp(max=4095))(*args, **options)


@with_cache
def block_numbers_in_four_bits(cache):
    """The seventeenth block is the first again."""
    real = cache.store.blocks

    def blocks(*args, **options):
        found = [(keys.clone(), values.clone()) for keys, values in real(*args, **options)]
        return iter([*(found[i % 16] for i in range(len(found) - 1)), *found[-1:]])

    cache.store.blocks = blocks


def window_drops_one_once_full(*args, **options):
    """As a ring that forgets the oldest token before it has made room."""

    def change(real):
        def attention(module, query, view, *, sliding_window=None, **rest):
            full = sliding_window is not None and min(view.starts) >= sliding_window
            window = sliding_window - 1 if full else sliding_window
            return real(module, query, view, sliding_window=window, **rest)

        return attention

    return _with_attention(change, "exact")(*args, **options)


def chunk_of_a_window_and_one(*args, **options):
    """A chunk is taken to fit in the window where it is one token longer."""

    def change(real):
        def attention(module, query, view, *, sliding_window=None, **rest):
            if query.shape[2] - 1 == sliding_window and not any(view.starts):
                sliding_window = None
            return real(module, query, view, sliding_window=sliding_window, **rest)

        return attention

    return _with_attention(change, "exact")(*args, **options)


def two_tokens_see_the_first_ones_window(*args, **options):
    """The mask of a pass of two tokens is that of one."""

    def change(real):
        def attention(module, query, view, *, sliding_window=None, **rest):
            found = real(module, query, view, sliding_window=sliding_window, **rest)
            if query.shape[2] == 2 and sliding_window is not None:
                wider = real(module, query, view, sliding_window=sliding_window + 1, **rest)
                found = torch.cat([found[:, :1], wider[:, 1:]], dim=1)
            return found

        return attention

    return _with_attention(change, "exact")(*args, **options)


@with_cache
def undo_past_the_window_ignored(cache):
    """What cannot be cut stays, without a word."""
    real = cache.store.truncate

    def truncate(sequence, num_tokens):
        try:
            real(sequence, num_tokens)
        except KVStoreError:
            return

    cache.store.truncate = truncate


@with_cache
def refused_undo_half_done(cache):
    """The positions are forgotten before the store says no."""

    def crop(tokens_to_remove):
        cache.kept = [kept[:tokens_to_remove] for kept in cache.kept]
        for row, sequence in enumerate(cache.rows):
            cache.store.truncate(sequence, len(cache.kept[row]))

    cache.crop = crop


@with_cache
def state_not_kept_after_a_single_token(cache):
    """As a convolution that wants a window of tokens."""
    _state_unless(cache, lambda num_new: num_new == 1)


@with_cache
def state_not_kept_after_64_tokens(cache):
    """As a loop that ends before a last whole part."""
    _state_unless(cache, lambda num_new: num_new == 64)


def _state_unless(cache, lost):
    states = cache.store._states
    real = states.put_state

    def put_state(layer_idx, sequence, num_new, state):
        before = states.state(layer_idx, sequence)
        if before is not None and lost(num_new):
            state = [value.clone() for value in before]
        real(layer_idx, sequence, num_new, state)

    states.put_state = put_state


def _blockwise_scale_off(real):
    return lambda module, query, view, *, scaling, **rest: real(
        module, query, view, scaling=1.01 * scaling, **rest
    )


def blockwise_scale_off(*args, **options):
    return _with_attention(_blockwise_scale_off)(*args, **options)


def large_blockwise_scale_off(*args, **options):
    """Where scores are large."""
    return _with_attention(_blockwise_scale_off)(*args, **options)


def small_blockwise_scale_off(*args, **options):
    """Where scores are small."""
    return _with_attention(_blockwise_scale_off)(*args, **options)


class _Rounded:
    """A kernel whose sums are told in eight bits."""

    def __init__(self, real):
        self._real = real
        self.takes, self.causal, self.windows = real.takes, real.causal, real.windows

    def __call__(self, *parts, **rest):
        output, lse = self._real(*parts, **rest)
        return output, lse.bfloat16().float()

    def several(self, *_):
        return None


def blockwise_weights_in_bfloat16(*args, **options):
    """Parts are weighed by numbers of eight bits."""
    return _with_attention(lambda real: replace(real, kernels=tuple(map(_Rounded, real.kernels))))(
        *args, **options
    )


def blockwise_window_off(*args, **options):
    def change(real):
        def attention(module, query, view, *, sliding_window=None, **rest):
            window = sliding_window and sliding_window + 1
            return real(module, query, view, sliding_window=window, **rest)

        return attention

    return _with_attention(change)(*args, **options)


def blockwise_sinks_ignored(*args, **options):
    return _with_attention(
        lambda real: lambda *parts, s_aux=None, **rest: real(*parts, s_aux=None, **rest)
    )(*args, **options)


def _llama(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


def _windowed(check, sentence, load):
    return broken_adapter(check, sentence, Qwen3, load=load)


BROKEN_SIZES = [
    _llama("exact.long", "Positions are rounded to bfloat16.", positions_in_bfloat16),
    _llama("exact.long", "Positions end at 4,095.", positions_cut_at_4096),
    _llama("exact.long", "The seventeenth KV block is the first.", block_numbers_in_four_bits),
    _windowed("exact.window-edges", "A full window lets go one early.", window_drops_one_once_full),
    _windowed("exact.window-edges", "A chunk of window + 1 is not cut.", chunk_of_a_window_and_one),
    _windowed(
        "exact.window-edges",
        "The second of two tokens sees one too many.",
        two_tokens_see_the_first_ones_window,
    ),
    _windowed(
        "exact.window-undo", "An undo past the window is ignored.", undo_past_the_window_ignored
    ),
    _windowed("exact.window-undo", "A refused undo is half done.", refused_undo_half_done),
    broken_adapter(
        "exact.short-passes",
        "A pass of one token does not change the state.",
        Qwen3NextAdapter,
        load=state_not_kept_after_a_single_token,
    ),
    broken_adapter(
        "exact.short-passes",
        "A pass of 64 tokens does not change the state.",
        Qwen3NextAdapter,
        load=state_not_kept_after_64_tokens,
    ),
    _llama("exact.blockwise", "Its scores are 1% too large.", blockwise_scale_off),
    broken_adapter(
        "exact.blockwise",
        "Large scores are 1% too large.",
        GraniteOne,
        load=large_blockwise_scale_off,
    ),
    broken_adapter(
        "exact.blockwise",
        "Small scores are 1% too large.",
        GraniteSmall,
        load=small_blockwise_scale_off,
    ),
    _llama("exact.blockwise", "Its parts are weighed in bfloat16.", blockwise_weights_in_bfloat16),
    _windowed("exact.blockwise", "Its windows are one token too long.", blockwise_window_off),
    broken_adapter("exact.blockwise", "It ignores sinks.", GptOss, load=blockwise_sinks_ignored),
]
