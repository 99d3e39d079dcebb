"""The contract of a weight streamer."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from ollm_conformance.checks import check
from ollm_conformance.compare import same_bits
from ollm_conformance.parts.base import (
    GoesThrough,
    PartSuite,
    nothing_left,
    open_files,
    refusal,
    unreadable,
)
from ollm_conformance.parts.tiny_weights import NUM_UNITS, Model
from ollm_conformance.parts.weight_walk import WeightWalk
from ollm_conformance.process_memory import SLACK, every_time, process_memory
from ollm_conformance.seeds import run_seed
from ollm_core import DoesNotFitError, MemoryAccount, ReadError
from ollm_core.testing import Units, WeightStreamer

PAGE_SLACK = 2 * 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = 30
"""Scale of a model of 31 MB."""


class WeightStreamerConformance(PartSuite):
    """Every check of a weight streamer. Subclass it as `TestX` and write `open_streamer`."""

    least_share: ClassVar[float] = 0.7
    """The smallest part of a model of seven units, as stored, that it can run in."""

    @classmethod
    def open_streamer(
        cls, units: Units, files: Sequence[Path], dtype: torch.dtype, account: MemoryAccount
    ) -> WeightStreamer:
        """A streamer of `units`, which lie in `files`, that computes in `dtype` on the CPU.

        It holds as much as the limit of `account` allows, all of it reserved there. Raises
        DoesNotFitError, with nothing left open, if the limit is too small.
        """
        raise NotImplementedError

    @classmethod
    @contextmanager
    def opened(
        cls,
        share: float | None = None,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype = torch.float32,
    ) -> Iterator[tuple[WeightStreamer, Model, MemoryAccount]]:
        """A streamer in a `share` (default: the least) of the model's bytes, closed afterwards.

        It computes in `dtype`, from weights that are `stored` in another or the same.
        """
        with tempfile.TemporaryDirectory() as name:
            model = Model.write(Path(name), stored)
            share = cls.least_share if share is None else share
            account = MemoryAccount("memory", int(share * model.streamed_bytes))
            files = list(model.checkpoint.files)
            with cls.open_streamer(model.units, files, dtype, account) as streamer:
                yield streamer, model, account

    @check(
        "weight-streamer.parameters",
        "In every pass each unit's parameters are, in its order, bit for bit those of the file, "
        "whatever the budget.",
        look="acquire(): which buffer holds which unit",
    )
    @pytest.mark.parametrize("share", [None, 0.8, 1.1, 1.6, 4.0])
    def test_parameters(self, share: float | None) -> None:
        if share is not None and share < self.least_share:
            share = self.least_share
        for dtype in (torch.float32, torch.bfloat16):
            with self.opened(share, dtype, dtype) as (streamer, model, _):
                for number in range(3):
                    model.walk(streamer, f"pass {number + 1} in {dtype}", dtype)

    @check(
        "weight-streamer.dtype",
        "Parameters and embeddings come in the compute dtype, rounded as torch rounds.",
        look="acquire() and embed(): the conversion from the checkpoint's dtype",
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype(self, dtype: torch.dtype) -> None:
        with self.opened(1.5, dtype) as (streamer, model, _):
            for number in range(2):
                model.walk(streamer, f"pass {number + 1} in {dtype}", dtype)
            rows = streamer.embed(torch.tensor([3]))
            same_bits(rows, model.embedding[[3]].to(dtype), f"embedding in {dtype}")

    @check(
        "weight-streamer.alignment",
        "float32 parameters lie at multiples of 64 bytes, as those of a fresh model do.",
        look="acquire(): matrix libraries give other last bits for data that is not aligned",
    )
    def test_alignment(self) -> None:
        for share in (self.least_share, 4.0):
            with self.opened(share) as (streamer, _, _):
                for unit_idx in range(NUM_UNITS):
                    with streamer.acquire(unit_idx) as parameters:
                        for i, parameter in enumerate(parameters):
                            assert parameter.data_ptr() % 64 == 0, (
                                f"expected parameter {i} of unit {unit_idx} at a multiple of 64, "
                                f"got {parameter.data_ptr() % 64} behind one"
                            )

    @check(
        "weight-streamer.in-use",
        "What was acquired stays as it is until it is given back, however far is read ahead.",
        look="acquire(): no buffer is filled while its parameters are in use",
    )
    def test_in_use(self) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            with self.opened(None, dtype, dtype) as (streamer, model, _):
                for unit_idx in [*range(NUM_UNITS), 0, 1]:
                    with streamer.acquire(unit_idx) as parameters:
                        _wait_for_readers(streamer)
                        model.check(unit_idx, parameters, "after reading ahead", dtype)

    @check(
        "weight-streamer.two-at-once",
        "A unit stays valid while the next one is acquired too.",
        look="acquire(): each unit in use has a buffer of its own",
    )
    def test_two_at_once(self) -> None:
        dtype = torch.bfloat16
        with self.opened(None, dtype, dtype) as (streamer, model, _):
            for unit_idx in [*range(NUM_UNITS - 1), 0]:
                with streamer.acquire(unit_idx) as first, streamer.acquire(unit_idx + 1) as second:
                    _wait_for_readers(streamer)
                    model.check(unit_idx, first, "the first of two", dtype)
                    model.check(unit_idx + 1, second, "the second of two", dtype)

    @check(
        "weight-streamer.any-order",
        "Units that are skipped, repeated or asked for backwards are right too.",
        look="acquire(): what was read ahead need not be what is wanted",
    )
    def test_any_order(self) -> None:
        for share in (self.least_share, 1.2):
            with self.opened(share) as (streamer, model, _):
                model.walk(streamer, "out of order", order=[3, 1, 1, 0, 6, 5, 2, 4, 0, 6, 3])
                model.walk(streamer, "then a pass")

    @check(
        "weight-streamer.walk",
        "Whatever is acquired, one unit or two, given back, broken off or embedded, in whatever "
        "order and budget, what is in use stays what it is.",
        look="acquire() and embed(): buffers that calls share",
    )
    def test_walk(self) -> None:
        draw = random.Random(run_seed())
        for number in range(4):
            share = max(self.least_share, draw.choice([0.8, 1.1, 1.6, 4.0]))
            dtype = torch.bfloat16  # of stored float32, in half of the walks
            stored = draw.choice([torch.bfloat16, torch.float32])
            with self.opened(share, dtype, stored) as (streamer, model, _):
                told = f"seed {run_seed()}, walk {number} in a share of {share}"
                WeightWalk(streamer, model, dtype, draw).run(told)

    @check(
        "weight-streamer.broken-off",
        "After a pass that stopped in the middle the next one starts with its first unit.",
        look="acquire(): leaving the context by an exception gives the buffer back",
    )
    def test_broken_off(self) -> None:
        with self.opened() as (streamer, model, _):
            for stop in (0, 1, 3, 6):
                model.walk(streamer, f"before stopping at {stop}", order=range(stop))
                interrupt = KeyboardInterrupt()
                told = f"leaving unit {stop} by an exception"
                with GoesThrough(interrupt, told), streamer.acquire(stop):
                    raise interrupt
                model.walk(streamer, f"after a pass that stopped at {stop}")

    @check(
        "weight-streamer.experts",
        "Routed experts come each once, in ascending order, with their own weights, whatever is "
        "asked for first or most, in little memory and in much.",
        look="experts(): their order is that in which outputs are added up; which buffer holds one",
    )
    def test_experts(self) -> None:
        requests: list[Iterable[int]] = [
            [2], [4, 0, 2], [1, 1, 3, 1], {5: 1, 0: 7, 3: 2}, {0: 1, 11: 9, 2: 3}, range(12),
        ]  # fmt: skip
        for share in (self.least_share, 4.0):
            with tempfile.TemporaryDirectory() as name:
                model = Model.write(Path(name), num_experts=12)
                account = MemoryAccount("memory", int(share * model.streamed_bytes))
                files = list(model.checkpoint.files)
                with self.open_streamer(model.units, files, torch.float32, account) as streamer:
                    for request in requests * 2:
                        model.walk(streamer, "before the experts", order=[0, 1])
                        what = f"experts {request} of layer 1 in {account.limit} bytes"
                        wanted, got = sorted(set(request)), []
                        with streamer.experts(1, request) as steps:
                            for number, parameters in steps:
                                got.append(number)
                                told = f"{what}: expert {number}"
                                same_bits(parameters[0], model.experts[number], told)
                        assert got == wanted, f"{what}: expected the order {wanted}, got {got}"

    @check(
        "weight-streamer.embed",
        "Embedding rows come in the order of the token ids, repeated ones and the last one too.",
        look="embed()",
    )
    def test_embed(self) -> None:
        with self.opened() as (streamer, model, _):
            for ids in ([0], [56], [5, 0, 5, 56, 1, 1], list(range(57)), [56, 3, 2, 1] * 30):
                for time in ("once", "again"):
                    rows = streamer.embed(torch.tensor(ids))
                    same_bits(rows, model.embedding[ids], f"rows {ids[:6]}, asked for {time}")
                    rows.mul_(3)  # they are the caller's
                model.walk(streamer, "a pass after embed()", order=[0, 1])

    @check(
        "weight-streamer.read-error",
        "A read that fails is a ReadError, what came before it is right, and the next pass works.",
        look="acquire() and embed(): errors of the reading thread and of the operating system",
    )
    def test_read_error(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            model = Model.write(Path(name))
            account = MemoryAccount("memory", int(self.least_share * model.streamed_bytes))
            before = open_files()
            with self.open_streamer(
                model.units, list(model.checkpoint.files), torch.float32, account
            ) as streamer:
                mine = [
                    n
                    for n, path in open_files().items()
                    if before.get(n) != path and path.startswith(str(Path(name).resolve()))
                ]
                model.walk(streamer, "before the error")
                for number in range(2):
                    with unreadable(mine):
                        refused = 0
                        for _ in range(3):
                            try:
                                model.walk(streamer, "while storage fails")
                            except ReadError:
                                refused += 1
                        assert refused, "expected ReadError in three passes, got no error"
                        refusal(ReadError, partial(streamer.embed, torch.tensor([17])), "embed()")
                        _wait_for_readers(streamer)
                    try:
                        model.walk(streamer, f"after {number + 1} failures")
                    except ReadError as error:
                        raise AssertionError(
                            f"expected a pass that works when storage does, got {error!r}"
                        ) from error
                    same_bits(streamer.embed(torch.tensor([9])), model.embedding[[9]], "embed()")

    @check(
        "weight-streamer.bytes-read",
        "A pass reads what is not kept, counts it, and reads nothing more.",
        look="bytes_read; units that are read twice; what is kept beyond the budget",
    )
    def test_bytes_read(self) -> None:
        for share in (self.least_share, 0.9):
            with self.opened(share) as (streamer, model, account):
                model.walk(streamer, "the first pass")
                before = streamer.bytes_read
                num_passes = 6
                for number in range(num_passes):
                    model.walk(streamer, f"pass {number + 2}")
                streamer.close()  # nothing is read any more
                count = streamer.bytes_read - before
                whole = model.streamed_bytes
                pages = PAGE_SLACK * sum(len(u.tensors) for u in model.units.in_pass_order)
                # Before and after these passes some of the next may have been read ahead.
                least = num_passes * (whole - account.limit) - account.limit
                most = num_passes * (whole + pages) + account.limit
                assert max(least, 1) <= count <= most, (
                    f"expected {max(least, 1)} to {most} bytes in {num_passes} passes over a model "
                    f"of {whole} bytes in {account.limit}, got {count}"
                )

    @check(
        "weight-streamer.budget",
        "It keeps no weights for which it holds no memory: what is not reserved is read again in "
        "each pass.",
        look="what is kept between passes, and what of it is reserved in the account",
    )
    def test_budget(self) -> None:
        for share in (self.least_share, 0.9, 1.2):
            with self.opened(share) as (streamer, model, account):
                model.walk(streamer, "the first pass")
                before = streamer.bytes_read
                num_passes = 6
                for number in range(num_passes):
                    model.walk(streamer, f"pass {number + 2}")
                held = account.used
                streamer.close()
                # A reader may be ahead by what its buffers hold.
                count = streamer.bytes_read - before + held
                kept = model.streamed_bytes - count / num_passes
                assert kept <= held <= account.limit, (
                    f"expected no more kept than is reserved, got {kept:.0f} bytes kept, "
                    f"{held} reserved, limit {account.limit}"
                )

    @check(
        "weight-streamer.memory",
        "The process holds what the streamer has reserved and no more, pass after pass, and "
        "nothing when it is closed.",
        look="copies of weights that are in no account: numpy arrays, bytes and maps count too",
    )
    @every_time
    def test_memory(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            model = Model.write(Path(name), scale=LARGE)
            files, whole = list(model.checkpoint.files), model.streamed_bytes
            for share in (4.0, self.least_share):
                with process_memory() as memory:
                    account = MemoryAccount("memory", int(share * whole))
                    with self.open_streamer(model.units, files, torch.float32, account) as streamer:
                        for number in range(2):
                            what = f"pass {number + 1} over {whole} bytes in {account.limit}"
                            model.walk(streamer, what)
                            with streamer.acquire(0):
                                _wait_for_readers(streamer)
                                reserved = "which the account has reserved"
                                memory.expect(account.used, what, reserved)
                    # Twice the room: reading threads leave arenas of the allocator behind.
                    memory.expect(SLACK, "a closed streamer", "as before it was opened")

    @check(
        "weight-streamer.does-not-fit",
        "A budget that is too small is refused, and nothing is left of the attempt.",
        look="opening: close what is open before the error goes on",
    )
    def test_does_not_fit(self) -> None:
        with tempfile.TemporaryDirectory() as name, nothing_left(Path(name)):
            model = Model.write(Path(name))
            for limit in (1, 1000, 100_000):
                account = MemoryAccount("memory", limit)
                files = list(model.checkpoint.files)
                refusal(
                    DoesNotFitError,
                    partial(self.open_streamer, model.units, files, torch.float32, account),
                    f"a budget of {limit} bytes for a model of {model.streamed_bytes}",
                )
                assert account.used == 0, f"expected an empty account, got {account.used} bytes"

    @check(
        "weight-streamer.closed",
        "A streamer can be closed twice, in the middle of a pass too, and leaves no memory, file "
        "or thread.",
        look="close()",
    )
    def test_closed(self) -> None:
        for num_units in (0, 2, NUM_UNITS):
            with tempfile.TemporaryDirectory() as name, nothing_left(Path(name)):
                model = Model.write(Path(name))
                account = MemoryAccount("memory", int(self.least_share * model.streamed_bytes))
                files = list(model.checkpoint.files)
                streamer = self.open_streamer(model.units, files, torch.float32, account)
                model.walk(streamer, "before closing", order=range(num_units))
                streamer.close()
                streamer.close()
                assert account.used == 0, f"expected an empty account, got {account.used} bytes"


def _wait_for_readers(streamer: WeightStreamer) -> None:
    """Let whatever reads ahead get as far as it may. How far that is decides nothing."""
    quiet, last = 0, -1
    while quiet < 3:
        time.sleep(0.01)
        quiet, last = (quiet + 1 if streamer.bytes_read == last else 0), streamer.bytes_read
