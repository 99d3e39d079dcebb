"""Parts of unseen_d.py, each with one fault, and the suites that run them."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import contextmanager

import torch
from broken_kv_stores import geometry_of
from safetensors.torch import save_file
from unseen_c_parts import Buffered

from ollm_conformance import (
    AttentionConformance,
    ByteSourceConformance,
    CodecConformance,
    DrafterConformance,
    KVStoreConformance,
    WeightStreamerConformance,
)
from ollm_core import EncodedTensor, ReadError, UnsupportedError
from ollm_core.attention.options import CARRIED
from ollm_core.drafting.lookup import LookupDrafter
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import HostKVStore
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.streamer import TieredStreamer

_CPU = torch.device("cpu")


# Hurts: Ctrl-C in the middle of a long second prompt, on a model with windows: the layers that were
# through have let go of what was there before, and the conversation is lost.
class UndoNotPinned(HostKVStore):
    def reserve(self, sequence, num_tokens, longest=None):
        super().reserve(sequence, num_tokens, longest)
        for table in self._tables[sequence]:
            table.pinned = 0


class UndoNotPinnedSuite(KVStoreConformance):
    @staticmethod
    def open_store(shape, account, directory):
        return UndoNotPinned(geometry_of(shape), account)


# Hurts: a server with KV on disk: each cache leaves a file handle, and after a thousand prompts no
# file can be opened.
class DirectoryLeftOpen(DiskKVStore):
    def __init__(self, geometry, account, directory):
        super().__init__(geometry, account, directory, "0" * 64)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def append(self, layer_idx, sequence, keys, values):
        super().append(layer_idx, sequence, keys, values)
        if self.num_tokens(sequence, layer_idx) % self.block_size == 0:
            os.fsync(self._directory)  # the names of the files are safe, too


class DirectoryLeftOpenSuite(KVStoreConformance):
    @staticmethod
    def open_store(shape, account, directory):
        return DirectoryLeftOpen(geometry_of(shape), account, directory)


# Hurts: a mixture, or a model that drafts, where two threads read: one copies from the pages that
# the other is reading into, and weights are those of other layers.
class OneBounceBuffer(Buffered):
    name = "one-bounce-buffer"

    def __init__(self, paths):
        self._bounce = memoryview(bytearray(256 << 10))
        super().__init__(paths)

    def _read_into(self, part, tensor):
        done = 0
        while done < tensor.num_bytes:
            wanted = self._bounce[: tensor.num_bytes - done]
            count = os.preadv(self._files[tensor.path], [wanted], tensor.offset + done)
            if not count:
                raise ReadError(f"{tensor.path}: ends before the end of {tensor.name}")
            part[done : done + count] = wanted[:count]
            done += count


class OneBounceBufferSuite(ByteSourceConformance):
    @staticmethod
    def open_source(paths):
        return OneBounceBuffer(paths)


# Hurts: a program that asks again until a download is complete: each time that the last file is
# not there yet, the handles of those before it stay.
class HandlesOfAFailedOpening(Buffered):
    name = "handles-of-a-failed-opening"

    def __init__(self, paths):
        self._bytes_read = 0
        self._files = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths}

    def _read_into(self, part, tensor):
        done = 0
        while done < tensor.num_bytes:
            count = os.preadv(self._files[tensor.path], [part[done:]], tensor.offset + done)
            if not count:
                raise ReadError(f"{tensor.path}: ends before the end of {tensor.name}")
            done += count


class HandlesOfAFailedOpeningSuite(ByteSourceConformance):
    @staticmethod
    def open_source(paths):
        return HandlesOfAFailedOpening(paths)


# Hurts: every model: the gate of an MLP and what goes up beside it have one shape, so both are what
# was decoded last.
def planes_into_buffers(request):
    buffers = {}

    def join(high, low):
        if high.shape not in buffers:
            buffers[high.shape] = torch.empty(high.shape, dtype=torch.bfloat16)
        planes = buffers[high.shape].view(-1).view(torch.uint8).view(*high.shape, 2)
        planes[..., 0], planes[..., 1] = low, high
        return buffers[high.shape]

    return _planes(request, join)


def _planes(request, join):
    found = {}
    for stored, high in request.tensors.items():
        name = stored.removesuffix(".high")
        low = request.tensors.get(f"{name}.low")
        if not stored.endswith(".high") or low is None:
            continue
        if high.dtype == low.dtype == "U8" and high.shape == low.shape:
            found[name] = EncodedTensor((stored, low.name), "BF16", high.shape, join, cpu_only=True)
    return found


class PlanesIntoBuffersSuite(CodecConformance):
    codec = staticmethod(planes_into_buffers)

    @staticmethod
    def write(tensors, directory):
        stored = {}
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bfloat16 or "embed_tokens" in name:
                stored[name] = tensor.contiguous()
                continue
            planes = tensor.contiguous().view(-1).view(torch.uint8).view(*tensor.shape, 2)
            stored[f"{name}.low"] = planes[..., 0].contiguous()
            stored[f"{name}.high"] = planes[..., 1].contiguous()
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


# Hurts: every text: token ids on the CPU are those of the text itself, and what is hidden from the
# look-up is gone from the answer.
class SpecialTokensHidden:
    def __init__(self, request):
        self._lookup = LookupDrafter()

    def __call__(self, token_ids, num_tokens):
        token_ids[token_ids < 3] = 0  # what begins or ends a text is no match
        return self._lookup(token_ids, num_tokens)


class SpecialTokensHiddenSuite(DrafterConformance):
    @staticmethod
    def open_drafter(request):
        return SpecialTokensHidden(request)


# Hurts: a mixture of three experts or more for a token: their outputs are added up in another order
# than in the model that is not streamed, and its last bits are others; in bfloat16 soon its tokens.
class HottestExpertsFirst(TieredStreamer):
    def experts(self, layer_idx, expert_ids):
        return self._in_turn(layer_idx, Counter(expert_ids))

    @contextmanager
    def _in_turn(self, layer_idx, counts):
        def steps():
            for expert, count in counts.most_common():
                with super(HottestExpertsFirst, self).experts(layer_idx, {expert: count}) as found:
                    yield from found

        yield steps()


class HottestExpertsFirstSuite(WeightStreamerConformance):
    @staticmethod
    def open_streamer(units, files, dtype, account):
        accounts = PerMemory(account, MemoryAccount("host memory", 0))
        weights = HottestExpertsFirst(units, open_source(files), dtype, _CPU, accounts)
        try:
            weights.fit(account.limit - weights.fixed_device_bytes, 0)
        except BaseException:
            weights.close()
            raise
        return weights


# Hurts: Qwen2, whose keys have large biases: scores in the hundreds are more than float32 can take
# to the power of e, and the logits are no numbers.
class SumsOfPowers:
    def __call__(self, module, query, view, *, scaling, sliding_window=None, s_aux=None, **options):
        for name, value in options.items():
            if value is not None and name not in CARRIED:
                raise UnsupportedError(f"this attention does not know the option {name!r}")
        return torch.stack(
            [
                self._row(query[row].float(), view, row, scaling, sliding_window, s_aux)
                for row in range(len(query))
            ]
        ).to(query.dtype)

    def _row(self, query, view, row, scaling, window, sinks):
        query = query.unflatten(0, (len(view.keys[row]), -1))  # [G, P, T, D]
        places = torch.arange(query.shape[2])
        total, whole, begin = 0.0, 0.0, view.first(row, window) - view.starts[row]
        for keys, values in self._blocks(view, row, window):
            back = places[:, None] - torch.arange(begin, begin + keys.shape[1])
            hidden = (back < 0) | (back >= window if window is not None else False)
            scores = query @ keys.float().transpose(1, 2)[:, None] * scaling
            powers = self._powers(scores.masked_fill(hidden, -torch.inf))
            total = total + powers @ values.float()[:, None]
            whole = whole + powers.sum(-1, keepdim=True)
            begin += keys.shape[1]
        if sinks is not None:
            whole = whole + self._powers(sinks.float()).view(*query.shape[:2], 1, 1)
        return (total / whole).flatten(0, 1).transpose(0, 1)

    @staticmethod
    def _blocks(view, row, window):
        yield from view.past(row, window)
        yield view.keys[row], view.values[row]

    @staticmethod
    def _powers(scores):
        return scores.exp()


class SumsOfPowersSuite(AttentionConformance):
    attention = SumsOfPowers()
