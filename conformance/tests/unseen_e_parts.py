"""Parts of unseen_e.py, each with one fault, and the suites that run them."""

from __future__ import annotations

import torch
from broken_attentions import PlainAttention
from broken_drafters import Echo, Keeper
from broken_drafters import suite_of as drafter_suite_of
from broken_kv_stores import geometry_of
from turned_codec import Turned
from turned_codec import suite_of as codec_suite_of

from ollm_conformance import AttentionConformance, KVStoreConformance
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import HostKVStore


# Hurts: all that is computed after the first layer: on two threads, whatever the machine has.
class LeavesTwoThreads(Turned):
    def decode(self, turned, dtype, shape):
        torch.set_num_threads(2)
        return super().decode(turned, dtype, shape)


# Hurts: exactness: a product with a matrix that lies so has other last bits.
class ResultNotContiguous(Turned):
    def finish(self, value):
        return value.t().contiguous().t() if value.ndim == 2 else value


# Hurts: sampling with drafts: every text is drawn alike, whatever its seed.
class SeedsEverything(Echo):
    def draft(self, token_ids, num_tokens):
        torch.manual_seed(0)
        return super().draft(token_ids, num_tokens)


# Hurts: a server: what each text has reserved stays until there is one without drafts.
class BeginAddsUp(Keeper):
    def begin(self, num_tokens):
        if num_tokens:
            self.account.reserve("text", 8 * num_tokens)
            self.held += 8 * num_tokens
            self.room, self.length = torch.zeros(num_tokens, dtype=torch.long), 0
        else:
            super().begin(0)


# Hurts: a draft that is right to the last token: room for tokens that do not come stays held.
class TruncateToTheSameKeeps(HostKVStore):
    def truncate(self, sequence, num_tokens):
        if num_tokens != self.num_tokens(sequence):
            super().truncate(sequence, num_tokens)


# Hurts: a long context with KV on disk: a layer's KV is in memory as a whole, in no account.
class ReadsAllAtOnce(DiskKVStore):
    def blocks(self, layer_idx, sequence, num_tokens=None, first=0):
        pairs = super().blocks(layer_idx, sequence, num_tokens, first)
        return iter([(keys.clone(), values.clone()) for keys, values in pairs])


# Hurts: gpt-oss, which has a sink for each of its 64 heads and 8 key heads.
class SinksOfKeyHeads(PlainAttention):
    def sink_scores(self, sinks, heads):
        return super().sink_scores(sinks[heads], heads)


LeavesTwoThreadsSuite = codec_suite_of(LeavesTwoThreads)
LeavesTwoThreadsSuite.__name__ = "LeavesTwoThreadsSuite"
ResultNotContiguousSuite = codec_suite_of(ResultNotContiguous)
ResultNotContiguousSuite.__name__ = "ResultNotContiguousSuite"
SeedsEverythingSuite = drafter_suite_of(SeedsEverything)
SeedsEverythingSuite.__name__ = "SeedsEverythingSuite"
BeginAddsUpSuite = drafter_suite_of(BeginAddsUp)
BeginAddsUpSuite.__name__ = "BeginAddsUpSuite"


class TruncateToTheSameKeepsSuite(KVStoreConformance):
    @staticmethod
    def open_store(shape, account, directory):
        return TruncateToTheSameKeeps(geometry_of(shape), account)


class ReadsAllAtOnceSuite(KVStoreConformance):
    @staticmethod
    def open_store(shape, account, directory):
        return ReadsAllAtOnce(geometry_of(shape), account, directory, "0" * 64)


class SinksOfKeyHeadsSuite(AttentionConformance):
    attention = SinksOfKeyHeads()
