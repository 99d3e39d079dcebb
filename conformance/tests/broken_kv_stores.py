"""KV stores with one fault each, on top of core's."""

from __future__ import annotations

from dataclasses import replace

import torch
from broken import BrokenPart

from ollm_conformance import KVStoreConformance
from ollm_core import DoesNotFitError, SharedRun, TierBytes, TiledBlocks
from ollm_core.contracts.kv import KVGeometry
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import DeviceKVStore


def geometry_of(shape, repeat=1):
    """A shape of the conformance suite as a geometry of core, with more KV heads."""
    more = replace(shape, num_kv_heads=repeat * shape.num_kv_heads)
    return KVGeometry(more.kinds, shape.dtype, torch.device("cpu"), shape.block_size)


def suite_of(store, repeat=1):
    """The suite for a store in memory; with `repeat` it keeps each KV head so many times."""

    class Suite(KVStoreConformance):
        num_examples = 30

        @classmethod
        def open_store(cls, shape, account, directory):
            return store(geometry_of(shape, repeat), account)

    return Suite


def disk_suite_of(store):
    """The suite for a store on disk."""

    class Suite(KVStoreConformance):
        @classmethod
        def open_store(cls, shape, account, directory):
            return store(geometry_of(shape), account, directory, "f00d")

    return Suite


class LastBlockDropped(DeviceKVStore):
    def blocks(self, *arguments):
        found = list(super().blocks(*arguments))
        return iter(found[:-1] or found)


class Reversed(TiledBlocks):
    def __init__(self, blocks):
        self.blocks = blocks

    def __next__(self):
        return next(self.blocks)

    def tiles(self):
        for keys, values in self.blocks.tiles():
            yield keys.flip(0), values.flip(0)


class TilesReversed(DiskKVStore):
    def blocks(self, *arguments):
        return Reversed(super().blocks(*arguments))


class FirstKeyDropped(DeviceKVStore):
    def blocks(self, *arguments):
        for keys, values in super().blocks(*arguments):
            yield keys[:, 1:], values[:, 1:]


class KeysAndValuesSwapped(DeviceKVStore):
    def blocks(self, *arguments):
        for keys, values in super().blocks(*arguments):
            yield values, keys


class ThroughBfloat16(DeviceKVStore):
    def append(self, layer_idx, sequence, keys, values):
        dtype = keys.dtype
        rounded = keys.bfloat16().to(dtype), values.bfloat16().to(dtype)
        super().append(layer_idx, sequence, *rounded)


class KeepsWhatIsGiven(DeviceKVStore):
    waiting = ()

    def append(self, *arguments):
        self.flush()
        self.waiting = arguments

    def blocks(self, *arguments):
        self.flush()
        return super().blocks(*arguments)

    def flush(self):
        waiting, self.waiting = self.waiting, ()
        if waiting:
            super().append(*waiting)


class MarkedByInferenceMode(DeviceKVStore):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        shape, dtype = self.geometry.block_shape(0), self.geometry.dtype
        self._storage._new_block = lambda layer_idx: torch.empty(shape, dtype=dtype)


class OneBufferForAll(DeviceKVStore):
    def blocks(self, *arguments):
        buffer = torch.empty(self.geometry.block_shape(0), dtype=self.geometry.dtype)
        for keys, values in super().blocks(*arguments):
            part = buffer[:, :, : keys.shape[1]]
            yield part[0].copy_(keys), part[1].copy_(values)


class PrefixIgnored(DeviceKVStore):
    def blocks(self, layer_idx, sequence, num_tokens=None):
        return super().blocks(layer_idx, sequence)


class SecondReadReversed(DeviceKVStore):
    reads = 0

    def blocks(self, *arguments):
        self.reads += 1
        found = list(super().blocks(*arguments))
        return iter(found[::-1] if self.reads > 2 else found)


class CountsTheLongestLayer(DeviceKVStore):
    def num_tokens(self, sequence, layer_idx=None):
        if layer_idx is not None:
            return super().num_tokens(sequence, layer_idx)
        return max(table.num_tokens for table in self._tables_of(sequence))


class LayersMixed(DeviceKVStore):
    def append(self, layer_idx, sequence, keys, values):
        if self.num_tokens(sequence, layer_idx) > 3 and layer_idx:
            layer_idx = self.geometry.num_layers - layer_idx
        super().append(layer_idx, sequence, keys, values)


class SharesTheTail(DeviceKVStore):
    def shared_runs(self, layer_idx, sequences, ends):
        longer = [min(end + 3, self.num_tokens(s)) for s, end in zip(sequences, ends, strict=True)]
        return super().shared_runs(layer_idx, sequences, longer)


class SharesWhatItOnceDid(DeviceKVStore):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.forks = {}

    def fork(self, sequence, num_tokens=None):
        forked = super().fork(sequence, num_tokens)
        whole = self.num_tokens(forked) // self.block_size * self.block_size
        self.forks[forked] = sequence, whole
        return forked

    def shared_runs(self, layer_idx, sequences, ends):
        for row, sequence in enumerate(sequences):
            origin, whole = self.forks.get(sequence, (None, 0))
            end = min(whole, ends[row] // self.block_size * self.block_size)
            if end and origin in sequences:
                other = sequences.index(origin)
                if end <= ends[other]:
                    return [SharedRun((other, row), 0, end)]
        return ()


class StaleAfterTruncate(DeviceKVStore):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = {}

    def blocks(self, layer_idx, sequence, num_tokens=None):
        pairs = super().blocks(layer_idx, sequence, num_tokens)
        for i, (keys, values) in enumerate(pairs):
            key = layer_idx, sequence, i, keys.shape[1]
            yield self.read.setdefault(key, (keys.clone(), values.clone()))


class TruncateOffByOne(DeviceKVStore):
    def truncate(self, sequence, num_tokens):
        super().truncate(sequence, min(num_tokens + 1, self.num_tokens(sequence)))


class TruncateOfTooMuchIgnored(DeviceKVStore):
    def truncate(self, sequence, num_tokens):
        if num_tokens <= self.num_tokens(sequence):
            super().truncate(sequence, num_tokens)


class ForkSharesTail(DeviceKVStore):
    def fork(self, sequence, num_tokens=None):
        forked = super().fork(sequence, num_tokens)
        for table, source in zip(self._tables[forked], self._tables[sequence], strict=True):
            if table.num_tokens == source.num_tokens:
                table.tail = source.tail
        return forked


class ForkOfAForkIsOfItsOrigin(DeviceKVStore):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.origin = {}

    def fork(self, sequence, num_tokens=None):
        origin = self.origin.get(sequence, sequence)
        length = self.num_tokens(sequence) if num_tokens is None else num_tokens
        if origin not in self._tables or self.num_tokens(origin) < length:
            origin = sequence
        forked = super().fork(origin, length)
        self.origin[forked] = sequence
        return forked


class ReleaseLeaks(DeviceKVStore):
    def release(self, sequence):
        if sequence in self._tables:
            self.truncate(sequence, min(self.num_tokens(sequence), 5))


class HeadsRepeated(DeviceKVStore):
    """Told twice the KV heads."""

    def append(self, layer_idx, sequence, keys, values):
        repeated = keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
        super().append(layer_idx, sequence, *repeated)

    def blocks(self, *arguments):
        for keys, values in super().blocks(*arguments):
            yield keys[::2], values[::2]


class ReserveIgnoresTheAccount(DeviceKVStore):
    def reserve(self, sequence, num_tokens):
        self.num_tokens(sequence)


class RefusalKeepsSome(DeviceKVStore):
    def reserve(self, sequence, num_tokens):
        try:
            super().reserve(sequence, num_tokens)
        except DoesNotFitError:
            super().reserve(sequence, 1)
            raise


class ReservationStays(DeviceKVStore):
    def truncate(self, sequence, num_tokens):
        if num_tokens != max(self.num_tokens(sequence, i) for i in range(self.geometry.num_layers)):
            super().truncate(sequence, num_tokens)


class GrowthForgotten(DeviceKVStore):
    def growth_bytes(self, sequence, num_tokens):
        growth = super().growth_bytes(sequence, num_tokens)
        return TierBytes(device=growth.device // 2)


class CutDropsFirst(DeviceKVStore):
    def truncate(self, sequence, num_tokens):
        length = self.num_tokens(sequence)
        if 0 <= num_tokens < length:
            super().truncate(sequence, num_tokens // self.block_size * self.block_size + 0)
            self.reserve(sequence, num_tokens)
        super().truncate(sequence, min(num_tokens, self.num_tokens(sequence)))


class AnyLayerWillDo(DeviceKVStore):
    def append(self, layer_idx, sequence, keys, values):
        super().append(layer_idx % self.geometry.num_layers, sequence, keys, values)


class ClosedButHolding(DeviceKVStore):
    def close(self):
        self._closed = True


class LeavesAFile(DiskKVStore):
    def close(self):
        parent = self._disk.home.directory.parent
        super().close()
        if parent.is_dir():
            (parent / "left").touch()


class CountsNoReads(DiskKVStore):
    @property
    def bytes_read(self):
        return 0


BROKEN_KV_STORES = [
    BrokenPart(name, fault, suite, f"kv-store.{check}")
    for name, fault, suite, check in [
        ("last-block-dropped", "The last of several blocks is not read.",
         suite_of(LastBlockDropped), "read-back"),
        ("first-key-dropped", "The first token of each block is not read.",
         suite_of(FirstKeyDropped), "read-back"),
        ("keys-values-swapped", "Keys come back as values.",
         suite_of(KeysAndValuesSwapped), "read-back"),
        ("through-bfloat16", "What is stored is rounded to bfloat16.",
         suite_of(ThroughBfloat16), "read-back"),
        ("keeps-what-is-given", "The given tensors are stored, not copies of them.",
         suite_of(KeepsWhatIsGiven), "strided"),
        ("marked-by-inference-mode", "Blocks that are made in inference mode stay marked by it.",
         suite_of(MarkedByInferenceMode), "in-place"),
        ("one-buffer-for-all", "Blocks said to be in place are copied into one buffer.",
         suite_of(OneBufferForAll), "in-place"),
        ("prefix-ignored", "All tokens are read where the first ones were asked for.",
         suite_of(PrefixIgnored), "prefix"),
        ("second-read-reversed", "Later readings give the blocks in reverse.",
         suite_of(SecondReadReversed), "iterators"),
        ("longest-layer", "A sequence is as long as its longest layer.",
         suite_of(CountsTheLongestLayer), "num-tokens"),
        ("layers-mixed", "Later tokens of one layer go to another.",
         suite_of(LayersMixed), "layers"),
        ("stale-after-truncate", "Blocks that were read once are never read again.",
         suite_of(StaleAfterTruncate), "append-after-truncate"),
        ("truncate-off-by-one", "Truncating keeps one token more.",
         suite_of(TruncateOffByOne), "truncate"),
        ("truncate-too-much", "Truncating to more than there is does nothing.",
         suite_of(TruncateOfTooMuchIgnored), "truncate-refused"),
        ("fork-shares-tail", "A fork writes into the unfinished block of its origin.",
         suite_of(ForkSharesTail), "fork"),
        ("fork-of-fork", "A fork of a fork has the tokens of the first origin.",
         suite_of(ForkOfAForkIsOfItsOrigin), "state-machine"),
        ("release-leaks", "A released sequence keeps its first block.",
         suite_of(ReleaseLeaks), "release"),
        ("heads-repeated", "KV heads are stored once per query head.",
         suite_of(HeadsRepeated, 2), "held-bytes"),
        ("reserve-ignores-account", "Reserving reserves nothing and never refuses.",
         suite_of(ReserveIgnoresTheAccount), "reserve-refused"),
        ("refusal-keeps-some", "A refused reservation keeps some of what it tried to take.",
         suite_of(RefusalKeepsSome), "reserve-refused"),
        ("reservation-stays", "Truncating to the length that is there does nothing.",
         suite_of(ReservationStays), "reserve-undone"),
        ("growth-halved", "The growth that is told is half of what is taken.",
         suite_of(GrowthForgotten), "growth"),
        ("cut-drops-first", "Truncating drops the whole block before it looks for a copy of it.",
         suite_of(CutDropsFirst), "cut-without-memory"),
        ("any-layer", "Keys for a layer that is not there go to another.",
         suite_of(AnyLayerWillDo), "wrong-requests"),
        ("closed-but-holding", "A closed store still holds its memory.",
         suite_of(ClosedButHolding), "closed"),
        ("leaves-a-file", "A closed store leaves a file.",
         disk_suite_of(LeavesAFile), "closed"),
        ("counts-no-reads", "Bytes read from disk are not counted.",
         disk_suite_of(CountsNoReads), "bytes-read"),
        ("shares-the-tail", "What forks share goes past what was asked for.",
         suite_of(SharesTheTail), "shared"),
        ("shares-what-it-once-did", "A fork that was cut shares what it did before.",
         suite_of(SharesWhatItOnceDid), "shared"),
        ("tiles-reversed", "Several blocks at a time come in reverse.",
         disk_suite_of(TilesReversed), "tiles"),
    ]
]  # fmt: skip

GOOD_KV_STORES = [suite_of(DeviceKVStore)]
