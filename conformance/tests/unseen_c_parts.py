"""Parts of unseen_c.py, each with one fault, and the suites that run them."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from broken import Unseen
from broken_kv_stores import geometry_of
from safetensors.torch import save_file

from ollm_conformance import (
    AttentionConformance,
    ByteSourceConformance,
    CodecConformance,
    DrafterConformance,
    KVStoreConformance,
)
from ollm_core import ByteSource, EncodedTensor, ReadError
from ollm_core.attention.exact import exact_attention
from ollm_core.drafting import lookup as core_drafts
from ollm_core.kv.in_memory import HostKVStore


def kv_store(sentence, store):
    """An entry for a KV store class that is made from a geometry and an account."""

    def open_store(shape, account, directory):
        return store(geometry_of(shape), account)

    suite = type(
        f"Test{store.__name__}", (KVStoreConformance,), {"open_store": staticmethod(open_store)}
    )
    return Unseen(store.__name__, sentence, suite)


# Hurts: a prompt that is interrupted half-way through the layers: the first ones keep its tokens,
# the next prompt's come after them there, and what was reserved is never given back.
class NothingToCutNothingDone(HostKVStore):
    def truncate(self, sequence, num_tokens):
        if num_tokens != self.num_tokens(sequence):
            super().truncate(sequence, num_tokens)


# Hurts: a chat that goes back by some blocks and on with other words: the check of what is in
# memory takes the new keys for damage, and the answer ends in an error.
class ChecksumsOfWhatWasCut(HostKVStore):
    def __init__(self, geometry, account):
        super().__init__(geometry, account)
        self._sums = {}

    @property
    def in_place(self):
        return False

    def blocks(self, layer_idx, sequence, num_tokens=None, first=0):
        found = super().blocks(layer_idx, sequence, num_tokens, first)
        for number, (keys, values) in enumerate(found, first // self.block_size):
            if keys.shape[1] == self.block_size:
                parts = (part.contiguous().view(torch.uint8) for part in (keys, values))
                now = [int(part.sum()) for part in parts]
                if self._sums.setdefault((layer_idx, sequence, number), now) != now:
                    raise ReadError(f"KV block {number} of layer {layer_idx} changed in memory")
            yield keys, values

    def release(self, sequence):
        self._sums = {key: one for key, one in self._sums.items() if key[1] != sequence}
        super().release(sequence)


class Buffered(ByteSource):
    """Reads through the page cache. Good but for `_read_into`, which is to be given."""

    name = "buffered"

    def __init__(self, paths):
        self._files, self._bytes_read = {}, 0
        try:
            for path in paths:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise

    def read(self, tensors, buffer):
        offsets, end = [], 0
        for tensor in tensors:
            start = end + (tensor.offset - end) % 64
            try:
                self._read_into(buffer[start : start + tensor.num_bytes], tensor)
            except OSError as error:
                raise ReadError(f"{tensor.path}: {error.strerror}") from error
            offsets.append(start)
            end = start + tensor.num_bytes
        self._bytes_read += sum(tensor.num_bytes for tensor in tensors)
        return offsets

    def buffer_bytes(self, tensors):
        return sum(tensor.num_bytes + 64 for tensor in tensors)

    @property
    def bytes_read(self):
        return self._bytes_read

    def close(self):
        while self._files:
            os.close(self._files.popitem()[1])


# Hurts: a checkpoint on a network share that is cut short while it is used: the end of a layer is
# what the buffer held before, and text goes on with it.
class EndOfFileIsEndOfRead(Buffered):
    def _read_into(self, part, tensor):
        done = 0
        while done < tensor.num_bytes:
            count = os.preadv(self._files[tensor.path], [part[done:]], tensor.offset + done)
            if count <= 0:
                break
            done += count


# Hurts: any run in which the ring reads ahead while an expert or a kept layer is read: each moves
# the place in the file that the other reads from, and weights are those of elsewhere.
class OnePlaceForAllThreads(Buffered):
    def _read_into(self, part, tensor):
        file, done = self._files[tensor.path], 0
        os.lseek(file, tensor.offset, os.SEEK_SET)
        while done < tensor.num_bytes:
            count = os.readv(file, [part[done : done + (1 << 18)]])
            if count <= 0:
                raise ReadError(f"{tensor.path}: ends before the end of {tensor.name}")
            done += count


def source(sentence, made):
    """An entry for a reading engine."""

    def open_source(cls, paths):
        return made(paths)

    suite = type(
        f"Test{made.__name__}",
        (ByteSourceConformance,),
        {"open_source": classmethod(open_source)},
    )
    return Unseen(made.__name__, sentence, suite)


def joined_as_integers(high, low):
    return ((high.int() << 8) | low.int()).to(torch.int16).view(torch.bfloat16)


def planes(request):
    found = {}
    for stored, high in request.tensors.items():
        name = stored.removesuffix(".high")
        low = request.tensors.get(f"{name}.low")
        if not stored.endswith(".high") or low is None:
            continue
        if high.dtype == low.dtype == "U8" and high.shape == low.shape:
            found[name] = EncodedTensor((stored, low.name), "BF16", high.shape, joined_as_integers)
    return found


# Hurts: a model whose largest matrix is decoded inside a tight budget: integers of four bytes stand
# beside it, six times its size, and are told to nobody.
class TestIntegersBesideNotTold(CodecConformance):
    codec = staticmethod(planes)

    @classmethod
    def write(cls, tensors, directory):
        stored = {}
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bfloat16:
                stored[name] = tensor.contiguous()
                continue
            bits = tensor.contiguous().view(torch.int16).int()
            stored[f"{name}.high"] = ((bits >> 8) & 255).to(torch.uint8)
            stored[f"{name}.low"] = (bits & 255).to(torch.uint8)
        save_file(stored, directory / "model.safetensors", {"format": "pt"})


# Hurts: any text with a draft source of a smaller vocabulary, as a small model of the family: the
# prompt's own tokens are changed under the model, and shown to the user so.
class ClampsTheTextItself(core_drafts.LookupDrafter):
    def __init__(self, request):
        self._vocab_size = request.vocab_size - request.vocab_size // 8

    def __call__(self, token_ids, num_tokens):
        return super().__call__(token_ids.clamp_(max=self._vocab_size - 1), num_tokens)


class TestClampsTheTextItself(DrafterConformance):
    open_drafter = staticmethod(ClampsTheTextItself)


# Hurts: a batch of prompts of unequal length: all rows are attended as if they had as many earlier
# tokens as the first.
def attention_of_equal_rows(module, query, view, *, scaling, **options):
    alike = replace(view, starts=view.starts[:1] * len(view.starts))
    return exact_attention(module, query, alike, scaling=scaling, **options)


class TestAttentionOfEqualRows(AttentionConformance):
    attention = staticmethod(attention_of_equal_rows)
