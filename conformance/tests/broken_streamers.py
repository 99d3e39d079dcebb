"""Weight streamers with one fault each, around core's."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from contextlib import contextmanager
from typing import ClassVar

import torch
from broken import BrokenPart

from ollm_conformance import WeightStreamerConformance
from ollm_core import ReadError
from ollm_core.memory.accounts import MemoryAccount
from ollm_core.memory.pair import PerMemory
from ollm_core.testing import WeightStreamer
from ollm_core.weights.sources.posix import open_source
from ollm_core.weights.streamer import TieredStreamer


class Wrapped(WeightStreamer):
    """Core's streamer, unchanged."""

    def __init__(self, units, files, dtype, account):
        accounts = PerMemory(account, MemoryAccount("host memory", 0))
        self.dtype = dtype
        self.account = account
        self.inner = TieredStreamer(units, open_source(files), dtype, torch.device("cpu"), accounts)
        try:
            self.inner.fit(account.limit - self.inner.fixed_device_bytes, 0)
        except BaseException:
            self.inner.close()
            raise

    @contextmanager
    def acquire(self, unit_idx):
        with self.inner.acquire(unit_idx) as parameters:
            yield self.changed(unit_idx, parameters)

    def changed(self, unit_idx, parameters):
        """What is given out for the parameters of a unit."""
        return parameters

    def experts(self, layer_idx, expert_ids):
        return self.inner.experts(layer_idx, expert_ids)

    def embed(self, token_ids):
        return self.inner.embed(token_ids)

    @property
    def bytes_read(self):
        return self.inner.bytes_read

    def close(self):
        self.inner.close()


def suite_of(streamer):
    """The suite for a streamer."""

    class Suite(WeightStreamerConformance):
        @classmethod
        def open_streamer(cls, units, files, dtype, account):
            return streamer(units, files, dtype, account)

    return Suite


class PreviousUnit(Wrapped):
    """Parameters that have the shape of one of the unit before are that one."""

    last = ()

    def changed(self, unit_idx, parameters):
        before = {tuple(p.shape): p for p in self.last}
        self.last = [p.clone() for p in parameters]
        return [before.get(tuple(p.shape), p) for p in parameters]


class OtherOrder(Wrapped):
    def changed(self, unit_idx, parameters):
        return parameters[::-1] if unit_idx == 3 else parameters


class ThroughFloat16(Wrapped):
    def changed(self, unit_idx, parameters):
        return [p.half().to(p.dtype) for p in parameters]


class Misaligned(Wrapped):
    def changed(self, unit_idx, parameters):
        def moved(value):
            room = torch.empty(value.numel() + 17, dtype=value.dtype)[1 : value.numel() + 1]
            return room.view(value.shape).copy_(value)

        return [moved(p) for p in parameters]


class GivenBackTooEarly(Wrapped):
    @contextmanager
    def acquire(self, unit_idx):
        with self.inner.acquire(unit_idx) as parameters:
            pass
        yield parameters


class OneBuffer(Wrapped):
    """All parameters are copied to the same place."""

    buffer = None

    def changed(self, unit_idx, parameters):
        if self.buffer is None:
            self.buffer = torch.empty(1 << 20, dtype=self.dtype)
        given, end = [], 0
        for p in parameters:
            given.append(self.buffer[end : end + p.numel()].view(p.shape).copy_(p))
            end += -(-p.numel() // 64) * 64
        return given


class AlwaysTheNext(Wrapped):
    """What is given is what comes next in the pass, whatever was asked for."""

    following = 0

    @contextmanager
    def acquire(self, unit_idx):
        given = self.following
        self.following = (given + 1) % len(self.inner.units)
        with self.inner.acquire(given) as parameters:
            yield parameters


class GoesOnAfterABreak(Wrapped):
    """After a pass that was broken off the next one begins behind the break."""

    broken = None

    @contextmanager
    def acquire(self, unit_idx):
        broken, self.broken = self.broken, None
        with self.inner.acquire(unit_idx if broken is None else broken) as parameters:
            try:
                yield parameters
            except BaseException:
                self.broken = (unit_idx + 1) % len(self.inner.units)
                raise


class ZerosForErrors(Wrapped):
    @contextmanager
    def acquire(self, unit_idx):
        try:
            context = self.inner.acquire(unit_idx)
            parameters = context.__enter__()
        except ReadError:
            unit = self.inner.units[unit_idx]
            yield [torch.zeros(p.shape, dtype=self.dtype) for p in unit.parameters]
            return
        yield parameters
        context.__exit__(None, None, None)


class FailsForEver(Wrapped):
    error = None

    @contextmanager
    def acquire(self, unit_idx):
        if self.error is not None:
            raise self.error
        try:
            with self.inner.acquire(unit_idx) as parameters:
                yield parameters
        except ReadError as error:
            self.error = error
            raise


class SortedRows(Wrapped):
    def embed(self, token_ids):
        return self.inner.embed(token_ids.sort().values)


class CountsNothing(Wrapped):
    @property
    def bytes_read(self):
        return 0


class CountsTwice(Wrapped):
    @property
    def bytes_read(self):
        return 2 * self.inner.bytes_read


class BudgetIgnored(Wrapped):
    """Keeps everything, in an account that nobody looks at."""

    def __init__(self, units, files, dtype, account):
        super().__init__(units, files, dtype, MemoryAccount("mine", 1 << 40))


class RefusalLeavesFiles(Wrapped):
    def __init__(self, units, files, dtype, account):
        opened = [os.open(path, os.O_RDONLY) for path in files]
        super().__init__(units, files, dtype, account)
        for file in opened:
            os.close(file)


class LeavesAThread(Wrapped):
    stop = None

    def close(self):
        super().close()
        if self.stop is None:
            self.stop = threading.Event()
            threading.Thread(target=self.stop.wait, args=(2,), name="left", daemon=True).start()


class KeepsTheAccount(Wrapped):
    def close(self):
        if self.account.used:
            super().close()
            self.account.reserve("forgotten", 1)


class CopiesInNumpy(Wrapped):
    """Each unit is kept once more, though it is read in each pass."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.copies = {}

    def changed(self, unit_idx, parameters):
        self.copies[unit_idx] = [p.float().numpy().copy() for p in parameters]
        return parameters


class KeptByTheClass(Wrapped):
    """The bytes of units stay when the streamer is closed."""

    units: ClassVar = []

    def changed(self, unit_idx, parameters):
        self.units += [bytearray(p.contiguous().view(torch.uint8).numpy()) for p in parameters]
        return parameters


class SlowRelease(Wrapped):
    """What was given out is held for four more passes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.given = deque(maxlen=28)

    def changed(self, unit_idx, parameters):
        self.given.append([p.clone() for p in parameters])
        return self.given[-1]


class MostWantedFirst(Wrapped):
    """Experts come in the order of how many tokens go to them."""

    @contextmanager
    def experts(self, layer_idx, expert_ids):
        def steps():
            for number, count in Counter(expert_ids).most_common():
                with self.inner.experts(layer_idx, {number: count}) as found:
                    yield from found

        yield steps()


class RowsGivenOutAgain(Wrapped):
    """Rows of the same tokens are the tensor that was given out before."""

    given = None

    def embed(self, token_ids):
        if self.given is None or not torch.equal(self.given[0], token_ids):
            self.given = token_ids.clone(), self.inner.embed(token_ids)
        return self.given[1]


class EmbedsWhereAUnitIs(Wrapped):
    """Rows are read into the memory of a unit that is in use, if they fit: the first bytes of its
    largest parameter are others after that.
    """

    in_use = ()

    @contextmanager
    def acquire(self, unit_idx):
        with self.inner.acquire(unit_idx) as parameters:
            self.in_use = [p.clone() for p in parameters]
            try:
                yield self.in_use
            finally:
                self.in_use = ()

    def embed(self, token_ids):
        rows = self.inner.embed(token_ids)
        if self.in_use:
            largest = max(self.in_use, key=torch.Tensor.numel).view(-1)
            count = min(rows.numel(), largest.numel())
            largest[:count] = rows.view(-1)[:count]
        return rows


BROKEN_STREAMERS = [
    BrokenPart(name, fault, suite_of(streamer), f"weight-streamer.{check}")
    for name, fault, streamer, check in [
        ("previous-unit", "A parameter is that of the unit before.", PreviousUnit, "parameters"),
        ("other-order", "The parameters of a unit come in another order.",
         OtherOrder, "parameters"),
        ("through-float16", "Parameters are rounded to float16 on the way.",
         ThroughFloat16, "dtype"),
        ("misaligned", "Parameters lie between multiples of 64 bytes.", Misaligned, "alignment"),
        ("overwritten-in-use", "Buffers are filled again while they are in use.",
         GivenBackTooEarly, "in-use"),
        ("one-buffer", "Two units in use share one buffer.", OneBuffer, "two-at-once"),
        ("always-the-next", "A unit out of turn gets what is next in turn.",
         AlwaysTheNext, "any-order"),
        ("embeds-where-a-unit-is", "Embedding rows are read into a unit that is in use.",
         EmbedsWhereAUnitIs, "walk"),
        ("goes-on-after-a-break", "A pass after a broken one begins in the middle.",
         GoesOnAfterABreak, "broken-off"),
        ("zeros-for-errors", "A unit that cannot be read is zeros.",
         ZerosForErrors, "read-error"),
        ("fails-for-ever", "After one error every pass fails.", FailsForEver, "read-error"),
        ("copies-in-numpy", "A copy of each unit is kept in numpy.", CopiesInNumpy, "memory"),
        ("kept-by-the-class", "Bytes of units are kept by the class.", KeptByTheClass, "memory"),
        ("slow-release", "What was given out is held much longer.", SlowRelease, "memory"),
        ("sorted-rows", "Embedding rows come in the order of the table.", SortedRows, "embed"),
        ("most-wanted-first", "Experts of the most tokens come first.",
         MostWantedFirst, "experts"),
        ("rows-given-out-again", "Rows that the caller has changed are given out again.",
         RowsGivenOutAgain, "embed"),
        ("counts-nothing", "No bytes are counted.", CountsNothing, "bytes-read"),
        ("counts-twice", "Bytes are counted twice.", CountsTwice, "bytes-read"),
        ("budget-ignored", "Everything is kept, whatever the budget.", BudgetIgnored, "budget"),
        ("refusal-leaves-files", "Files stay open when the budget is refused.",
         RefusalLeavesFiles, "does-not-fit"),
        ("leaves-a-thread", "A closed streamer leaves a thread.", LeavesAThread, "closed"),
        ("keeps-the-account", "A closed streamer still holds memory.", KeepsTheAccount, "closed"),
    ]
]  # fmt: skip

GOOD_STREAMERS = [suite_of(Wrapped)]
