"""What goes wrong at sizes and numbers that tiny runs do not reach: many positions, the edges of a
window, passes of few tokens, packed numbers at their edges, memory that no account knows.
"""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from broken import broken_adapter
from broken_models import with_cache
from families import GptOss, Granite, Qwen3

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_adapter_qwen3_next import Qwen3NextAdapter
from ollm_core import KVStoreError, ParameterSource, calls


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

        def run(store, work, plan):
            find = calls.find_attention
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(calls, "find_attention", lambda *asked: change(find(*asked)))
                return real(store, work, plan)

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
    """Not more than a window is cut, without a word."""
    real = cache.store.truncate

    def truncate(sequence, num_tokens):
        real(sequence, max(num_tokens, cache.store.num_tokens(sequence) - 100))

    cache.store.truncate = truncate


@with_cache
def refused_undo_half_done(cache):
    """The positions are forgotten before the store says no."""

    def crop(tokens_to_remove):
        cache.kept = [kept[:tokens_to_remove] for kept in cache.kept]
        raise KVStoreError("the window is longer than what is kept")

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


def blockwise_weights_in_bfloat16(*args, **options):
    """Parts are weighed by numbers of eight bits."""

    def change(real):
        def kernel(one):
            def call(*parts, **rest):
                output, lse = one(*parts, **rest)
                return output, lse.bfloat16().float()

            members = {
                "takes": one.takes,
                "causal": one.causal,
                "windows": one.windows,
                "several": lambda *_: None,
                "__call__": lambda _, *parts, **rest: call(*parts, **rest),
            }
            return type("Rounded", (), members)()

        return replace(real, kernels=tuple(kernel(one) for one in real.kernels))

    return _with_attention(change)(*args, **options)


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


class GraniteOne(Granite):
    """Scores are not made smaller, and softmax is sharp."""

    def tiny_config(self):
        return {**super().tiny_config(), "attention_multiplier": 1.0}


class GraniteSmall(Granite):
    """As published: scores are small, and softmax is flat."""

    def tiny_config(self):
        return {**super().tiny_config(), "attention_multiplier": 0.015625}


class _Decoded(GptOssAdapter):
    """Packed experts are decoded by another transform."""

    def experts(self, config, parameter):
        return [
            replace(source, transform=self.decoder(source.transform))
            if source.transform is not None
            else source
            for source in super().experts(config, parameter)
        ]


class BiasOf126(_Decoded):
    @staticmethod
    def decoder(real):
        return lambda blocks, scales: real(blocks, scales) * 2


class SignsLost(_Decoded):
    @staticmethod
    def decoder(real):
        return lambda blocks, scales: real(blocks & 0x77, scales)


class ZeroScaleIsNothing(_Decoded):
    """A scale of 0 is taken to say that there is nothing."""

    @staticmethod
    def decoder(real):
        return lambda blocks, scales: real(blocks * (scales > 0)[..., None], scales)


class LargestScaleClamped(_Decoded):
    @staticmethod
    def decoder(real):
        return lambda blocks, scales: real(blocks, scales.clamp(max=253))


class NegativeZerosPacked(_Decoded):
    """Zeros have lost their sign, as after a sum."""

    @staticmethod
    def decoder(real):
        return lambda blocks, scales: real(blocks, scales) + 0.0


class ScalesAreSigned(_Decoded):
    """Those from 128 on are read as negative, and end at the smallest."""

    @staticmethod
    def decoder(real):
        return lambda blocks, scales: real(blocks, scales.where(scales < 128, scales - 128))


class _Computed(LlamaAdapter):
    """A transform computes with a projection."""

    def source(self, config, parameter):
        if parameter.endswith("down_proj.weight"):
            return ParameterSource((parameter,), self.computed)
        return super().source(config, parameter)


class NegativeZerosPlain(_Computed):
    @staticmethod
    def computed(tensor):
        return tensor + 0.0


class SubnormalsFlushed(_Computed):
    @staticmethod
    def computed(tensor):
        smallest = torch.finfo(tensor.dtype).smallest_normal
        return tensor.masked_fill((tensor.abs() < smallest) & (tensor != 0), 0.0)


class LargestClamped(_Computed):
    @staticmethod
    def computed(tensor):
        return tensor.clamp(-1e38, 1e38)


class ScaledAndBack(_Computed):
    """Exact for every usual number."""

    @staticmethod
    def computed(tensor):
        return tensor * 0.5 * 2.0


def weights_kept_in_numpy(*args, **options):
    """A copy of what is read, for a second use that never comes."""
    model = ollm.load(*args, **options)
    source = model.weights._source
    real, kept = source.read, {}

    def read(tensors, buffer):
        offsets = real(tensors, buffer)
        for tensor, offset in zip(tensors, offsets, strict=True):
            part = np.frombuffer(buffer, np.uint8)[offset : offset + tensor.num_bytes]
            kept[tensor.path, tensor.offset] = part.copy()
        return offsets

    source.read = read
    return model


def kv_kept_in_a_mapping(*args, **options):
    """What is appended has a copy that torch does not know."""
    return with_cache(_mapped_on_append)(*args, **options)


def _mapped_on_append(cache):
    real, kept = cache.store.append, []

    def append(layer_idx, sequence, keys, values):
        kept.append(_mapped(2 * keys.nbytes))
        real(layer_idx, sequence, keys, values)

    cache.store.append = append


def scratch_in_a_bytearray(*args, **options):
    """Room for a pass, taken when the model is opened."""
    model = ollm.load(*args, **options)
    model.scratch = bytearray(b"\1") * (12 << 20)
    return model


def tensors_of_a_pass_not_told(*args, **options):
    """Only while a pass runs, and gone when it ends."""
    model = ollm.load(*args, **options)
    real = model.engine.run

    def run(store, work):
        room = np.ones(12 << 20, np.uint8)
        try:
            return real(store, work)
        finally:
            del room

    model.engine.run = run
    return model


def bytes_of_every_pass(*args, **options):
    """Something of each token is kept, for a log."""
    model = ollm.load(*args, **options)
    real, log = model.engine.run, []

    def run(store, work):
        log.extend(bytearray(512 * len(item.token_ids)) for item in work)
        return real(store, work)

    model.engine.run = run
    return model


def tokens_of_every_sequence(*args, **options):
    """A table in numpy that no release empties."""
    return with_cache(_tables)(*args, **options)


_TABLES = []


def _tables(cache):
    real = cache.store.new_sequence

    def new_sequence():
        _TABLES.append(np.zeros(4096, np.int64))
        return real()

    cache.store.new_sequence = new_sequence


def mapping_of_every_fork(*args, **options):
    """Room for a fork's own blocks, never unmapped."""
    return with_cache(_mapped_on_fork)(*args, **options)


_MAPPED = []


def _mapped_on_fork(cache):
    real = cache.store.fork

    def fork(*args):
        _MAPPED.append(_mapped(1 << 20))
        return real(*args)

    cache.store.fork = fork


def closed_caches_kept(*args, **options):
    """A list of caches holds on to what they have, after they are closed."""
    return with_cache(_blocks_kept)(*args, **options)


_BLOCKS = []


def _blocks_kept(cache):
    real = cache.store.append

    def append(layer_idx, sequence, keys, values):
        if layer_idx == 0:
            _BLOCKS.append(keys[:, :1].clone())
        real(layer_idx, sequence, keys, values)

    cache.store.append = append


@with_cache
def charge_not_given_back(cache):
    """Every cut leaves a charge behind."""
    store = cache.store
    real, storage = store.truncate, store._storage

    def truncate(sequence, num_tokens):
        real(sequence, num_tokens)
        storage._charges.account.reserve("left", 64)

    store.truncate = truncate


def _mapped(num_bytes):
    room = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, num_bytes, mmap.PAGESIZE):
        room[page] = 1
    return room


def _llama(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


def _windowed(check, sentence, load):
    return broken_adapter(check, sentence, Qwen3, load=load)


BROKEN_SIZES = [
    _llama("exact.long", "Positions are rounded to bfloat16.", positions_in_bfloat16),
    _llama("exact.long", "Positions end at 4,095.", positions_cut_at_4096),
    _llama("exact.long", "The seventeenth KV block is the first.", block_numbers_in_four_bits),
    _windowed(
        "exact.window-edges", "A full window lets go one early.", window_drops_one_once_full
    ),
    _windowed(
        "exact.window-edges", "A chunk of window + 1 is not cut.", chunk_of_a_window_and_one
    ),
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
    broken_adapter(
        "exact.blockwise", "It ignores sinks.", GptOss, load=blockwise_sinks_ignored
    ),
    broken_adapter("weights.packed-edges", "Scales are counted from 126.", BiasOf126),
    broken_adapter("weights.packed-edges", "Negative codes lose their sign.", SignsLost),
    broken_adapter("weights.packed-edges", "A scale of 0 is nothing.", ZeroScaleIsNothing),
    broken_adapter("weights.packed-edges", "A scale of 254 is 253.", LargestScaleClamped),
    broken_adapter("weights.packed-edges", "Packed zeros lose their sign.", NegativeZerosPacked),
    broken_adapter("weights.packed-edges", "Scales from 128 on wrap around.", ScalesAreSigned),
    broken_adapter("weights.special-values", "Zeros lose their sign.", NegativeZerosPlain),
    broken_adapter("weights.special-values", "Subnormals become zero.", SubnormalsFlushed),
    broken_adapter("weights.special-values", "The largest numbers are cut.", LargestClamped),
    broken_adapter("weights.special-values", "Numbers are halved and doubled.", ScaledAndBack),
    _llama("memory.hidden", "Weights have a copy in numpy.", weights_kept_in_numpy),
    _llama("memory.hidden", "KV has a copy in a mapping.", kv_kept_in_a_mapping),
    _llama("memory.hidden", "A bytearray is not counted.", scratch_in_a_bytearray),
    _llama("memory.hidden", "A pass takes what it does not say.", tensors_of_a_pass_not_told),
    _llama("memory.sequences", "Bytes of every pass are kept.", bytes_of_every_pass),
    _llama("memory.sequences", "A table of every sequence is kept.", tokens_of_every_sequence),
    _llama("memory.sequences", "A mapping of every fork is kept.", mapping_of_every_fork),
    _llama("memory.sequences", "Closed caches leave tensors.", closed_caches_kept),
    _llama("memory.sequences", "Cuts leave a charge.", charge_not_given_back),
]  # fmt: skip
