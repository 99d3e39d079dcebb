"""Parts of unseen_g.py, each with one fault, and the suites that run them."""

from __future__ import annotations

from dataclasses import replace

import torch
from broken_drafters import Echo
from broken_drafters import suite_of as drafter_suite_of
from broken_kv_stores import disk_suite_of
from broken_kv_stores import suite_of as kv_suite_of
from broken_sources import PlainSource
from broken_sources import suite_of as source_suite_of
from broken_streamers import Wrapped
from broken_streamers import suite_of as streamer_suite_of
from turned_codec import Turned
from turned_codec import suite_of as codec_suite_of

from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.kv.in_memory import HostKVStore


# Hurts: `ollm run`, which tells how much KV there is: after a cut it tells what there was.
class CountsWhatWasFreed(HostKVStore):
    _most = 0

    def tier_bytes(self):
        found = super().tier_bytes()
        self._most = max(self._most, found.host) if found.host else 0
        return replace(found, host=self._most)


# Hurts: two answers to one question on disk: the second begins a token later.
class ForksWithoutATail(DiskKVStore):
    def fork(self, sequence, num_tokens=None):
        length = self.num_tokens(sequence) if num_tokens is None else num_tokens
        inside = length % self.block_size
        return super().fork(sequence, length - 1 if inside == 1 and length > 1 else length)


# Hurts: norms, biases and sinks.
class DecodesFlatOnesAlone(Turned):
    def finish(self, value):
        return value.flip(0) if value.dim() == 1 and len(value) % 2 else value


# Hurts: a second conversation: it is drafted for from the first one.
class RemembersTheTextBefore(Echo):
    before = torch.zeros(0, dtype=torch.long)

    def draft(self, token_ids, num_tokens):
        found = super().draft(token_ids, num_tokens)
        if not found and len(self.before) > 20:
            found = super().draft(torch.cat([self.before, token_ids]), num_tokens)
        self.before = token_ids.clone()
        return found


# Hurts: a prompt that says a word twice.
class RowsOfTheLastOne(Wrapped):
    def embed(self, token_ids):
        found = self.inner.embed(token_ids)
        if len(token_ids) > 2 and int(token_ids[0]) == int(token_ids[-1]):
            found = found.clone()
            found[0] = found[1]
        return found


# Hurts: tensors that begin in the middle of a page.
class StopsAtAPage(PlainSource):
    def fetch(self, path, offset, part):
        if offset % 4096 > 4000 and len(part) > 8192:
            part[-1:] = bytes(1)
            super().fetch(path, offset, part[:-1])
        else:
            super().fetch(path, offset, part)


def _named(suite, part):
    suite.__name__ = f"{part.__name__}Suite"
    return suite


CountsWhatWasFreedSuite = _named(kv_suite_of(CountsWhatWasFreed), CountsWhatWasFreed)
ForksWithoutATailSuite = _named(disk_suite_of(ForksWithoutATail), ForksWithoutATail)
DecodesFlatOnesAloneSuite = _named(codec_suite_of(DecodesFlatOnesAlone), DecodesFlatOnesAlone)
RemembersTheTextBeforeSuite = _named(
    drafter_suite_of(RemembersTheTextBefore), RemembersTheTextBefore
)
RowsOfTheLastOneSuite = _named(streamer_suite_of(RowsOfTheLastOne), RowsOfTheLastOne)
StopsAtAPageSuite = _named(source_suite_of(StopsAtAPage), StopsAtAPage)
