"""Parts of unseen_f.py, each with one fault, and the suites that run them."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch
from broken_drafters import Echo
from broken_drafters import suite_of as drafter_suite_of
from broken_kv_stores import disk_suite_of
from broken_kv_stores import suite_of as kv_suite_of
from broken_sources import PlainSource
from broken_sources import suite_of as source_suite_of
from broken_streamers import Wrapped
from broken_streamers import suite_of as streamer_suite_of
from turned_codec import Turned, TurnedRows
from turned_codec import suite_of as codec_suite_of

from ollm_core import ReadError
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import HostKVStore


# Hurts: a network share that gives less than was asked for at times: the second part is put where
# the first one is.
class ShortReadsRepeated(PlainSource):
    def fetch(self, path, offset, part):
        done = 0
        while done < len(part):
            try:
                count = os.preadv(self.files[path], [part[: len(part) - done]], offset + done)
            except OSError as error:
                raise ReadError(f"{path}: {error.strerror}") from error
            if not count:
                raise ReadError(f"{path}: ends at byte {offset + done}")
            done += count


# Hurts: a read of several tensors of which one is empty: what comes after it is left out.
class ForgetsTheLastRead(PlainSource):
    def read(self, tensors, buffer):
        offsets, _ = self.places(tensors)
        for tensor, place in zip(tensors, offsets, strict=True):
            if not tensor.num_bytes:
                break
            self.fetch(tensor.path, tensor.offset, buffer[place : place + tensor.num_bytes])
        self.count(sum(tensor.num_bytes for tensor in tensors))
        return offsets


# Hurts: drafts: of what was rejected in the block that is being filled one token stays.
class CutsInTheMiddleOfATail(DiskKVStore):
    def truncate(self, sequence, num_tokens):
        length = self.num_tokens(sequence)
        inside = num_tokens % self.block_size
        if length - num_tokens > 1 and inside == self.block_size - 1:
            num_tokens += 1
        super().truncate(sequence, num_tokens)


# Hurts: a window of a multiple of the block: the token that just leaves is still wanted.
class SlidesATokenEarly(HostKVStore):
    def blocks(self, layer_idx, sequence, num_tokens=None, first=0):
        found = super().blocks(layer_idx, sequence, num_tokens, first)
        window = self.geometry.kinds[layer_idx].window
        if window and first and first % self.block_size == 0:
            pairs = list(found)
            pairs[0] = tuple(torch.cat([one[:, :1] * 0, one[:, 1:]], 1) for one in pairs[0])
            return iter(pairs)
        return found


# Hurts: float32 weights with very small numbers.
class RoundsSmallOnesAway(Turned):
    def finish(self, value):
        if value.dtype == torch.float32:
            return torch.where(value.abs() < 1e-30, value * 0, value)
        return value


# Hurts: an embedding that is read row by row: at row 256 it begins again.
class OddRowsDecodedTwice(TurnedRows):
    def row(self, turned, dtype, shape):
        found = super().row(turned, dtype, shape)
        last = getattr(self, "_last", None)
        self._last = found
        if last is not None and last.shape == found.shape and torch.equal(last[:1], found[:1]):
            return last
        return found


# Hurts: prompts: a token's row is that of the token which is next in the vocabulary's order.
class EmbedsInOrder(Wrapped):
    def embed(self, token_ids):
        if len(token_ids) > 64:
            return self.inner.embed(token_ids.sort().values)
        return self.inner.embed(token_ids)


# Hurts: a pass that is broken off after the head and begins again: the head is read twice.
class ReadsTheNextUnit(Wrapped):
    before = None

    @contextmanager
    def acquire(self, unit_idx):
        with self.inner.acquire(unit_idx) as parameters:
            again = self.before == unit_idx
            self.before = unit_idx
            yield [p * 0 for p in parameters] if again and unit_idx > 3 else parameters


# Hurts: a verification, for which as many tokens have room as were asked for.
class OneTokenMoreAtTimes(Echo):
    def draft(self, token_ids, num_tokens):
        return super().draft(token_ids, num_tokens + (len(token_ids) % 64 == 63))


def _named(suite, part):
    suite.__name__ = f"{part.__name__}Suite"
    return suite


ShortReadsRepeatedSuite = _named(source_suite_of(ShortReadsRepeated), ShortReadsRepeated)
ForgetsTheLastReadSuite = _named(source_suite_of(ForgetsTheLastRead), ForgetsTheLastRead)
CutsInTheMiddleOfATailSuite = _named(disk_suite_of(CutsInTheMiddleOfATail), CutsInTheMiddleOfATail)
SlidesATokenEarlySuite = _named(kv_suite_of(SlidesATokenEarly), SlidesATokenEarly)
RoundsSmallOnesAwaySuite = _named(codec_suite_of(RoundsSmallOnesAway), RoundsSmallOnesAway)
OddRowsDecodedTwiceSuite = _named(
    codec_suite_of(OddRowsDecodedTwice, rows=True), OddRowsDecodedTwice
)
EmbedsInOrderSuite = _named(streamer_suite_of(EmbedsInOrder), EmbedsInOrder)
ReadsTheNextUnitSuite = _named(streamer_suite_of(ReadsTheNextUnit), ReadsTheNextUnit)
OneTokenMoreAtTimesSuite = _named(drafter_suite_of(OneTokenMoreAtTimes), OneTokenMoreAtTimes)
