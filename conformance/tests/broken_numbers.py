"""Numbers at the edges of their forms that are changed on the way, and memory that no account
knows.
"""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import torch
from broken import broken_adapter
from broken_caches import with_cache
from torch.nn import functional

import ollm
from ollm_adapter_gpt_oss import GptOssAdapter
from ollm_adapter_llama import LlamaAdapter
from ollm_core import ParameterSource


class _Changed(GptOssAdapter):
    """A transform computes with what is made of packed experts."""

    def experts(self, config, parameter):
        found = super().experts(config, parameter)
        if not parameter.endswith("_proj"):
            return found
        return [replace(source, transform=self.changed) for source in found]


class BiasOf126(_Changed):
    @staticmethod
    def changed(tensor):
        return tensor * 2


class SignsLost(_Changed):
    @staticmethod
    def changed(tensor):
        return tensor.abs()


class ZeroScaleIsNothing(_Changed):
    """What a scale of 0 can make is taken for nothing."""

    @staticmethod
    def changed(tensor):
        return tensor.where(tensor.abs() > 6 * 2.0**-127, 0)


class LargestScaleClamped(_Changed):
    """What only a scale of 254 can make is what one of 253 can."""

    @staticmethod
    def changed(tensor):
        return tensor.clamp(min=-6 * 2.0**126, max=6 * 2.0**126)


class NegativeZerosPacked(_Changed):
    """Zeros have lost their sign, as after a sum."""

    @staticmethod
    def changed(tensor):
        return tensor + 0.0


class ScalesAreSigned(_Changed):
    """Those from 128 on are read as negative, and end at the smallest."""

    @staticmethod
    def changed(tensor):
        return tensor.where(tensor.abs() < 8, tensor * 2.0**-126)


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
    model.scratch = bytearray(b"\1") * (48 << 20)
    return model


def tensors_of_a_pass_not_told(*args, **options):
    """Only while a pass runs, and gone when it ends."""
    model = ollm.load(*args, **options)
    real = model.engine.run

    def run(store, work):
        room = np.ones(48 << 20, np.uint8)
        try:
            return real(store, work)
        finally:
            del room

    model.engine.run = run
    return model


def bytes_of_every_pass(*args, **options):
    """Logits of all passes are kept, as text for a log."""
    model = ollm.load(*args, **options)
    real, log = model.engine.run, []

    def run(store, work):
        logits = real(store, work)
        log.extend(bytearray(one.float().numpy().tobytes()) for one in logits)
        return logits

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


def _with_products(linear):
    """Loads models of which products in half precision are `linear`."""

    def load(*args, **options):
        model = ollm.load(*args, **options)
        products = model.engine._skeleton.products
        if products is not None:
            products.linear = linear
        return model

    return load


def _half_sums(states, weight, bias=None):
    """Sums are rounded after every eight numbers."""
    total = 0
    for begin in range(0, weight.shape[1], 8):
        part = slice(begin, begin + 8)
        total = total + functional.linear(states[..., part], weight[:, part])
    return total if bias is None else total + bias


def _coarse_weights(states, weight, bias=None):
    """Weights have lost three bits."""
    return functional.linear(states, weight.to(torch.float8_e4m3fn).to(weight.dtype), bias)


def _llama(check, sentence, load):
    return broken_adapter(check, sentence, LlamaAdapter, load=load)


BROKEN_NUMBERS = [
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
    _llama("precision.fast", "Sums are in half precision.", _with_products(_half_sums)),
    _llama("precision.fast", "Weights are quantised.", _with_products(_coarse_weights)),
    _llama("memory.hidden", "Weights have a copy in numpy.", weights_kept_in_numpy),
    _llama("memory.hidden", "KV has a copy in a mapping.", kv_kept_in_a_mapping),
    _llama("memory.hidden", "A bytearray is not counted.", scratch_in_a_bytearray),
    _llama("memory.hidden", "A pass takes what it does not say.", tensors_of_a_pass_not_told),
    _llama("memory.sequences", "Bytes of every pass are kept.", bytes_of_every_pass),
    _llama("memory.sequences", "A table of every sequence is kept.", tokens_of_every_sequence),
    _llama("memory.sequences", "A mapping of every fork is kept.", mapping_of_every_fork),
    _llama("memory.sequences", "Closed caches leave tensors.", closed_caches_kept),
    _llama("memory.sequences", "Cuts leave a charge.", charge_not_given_back),
]
