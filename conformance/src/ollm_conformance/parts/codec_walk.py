"""Random walks over a weight codec: several checkpoints at a time, their tensors and rows in any
order, from buffers that are used again, with damage between them, and results that are kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_conformance.parts.codec_suite import SMALL, CodecSuite
from ollm_conformance.parts.encoded import DTYPES, Stored, bits, decoded, same_pattern
from ollm_core import CheckpointError, CodecRequest, EncodedTensor

_NUM_STEPS = 50
_MOST_OPEN = 3
_MOST_KEPT = 4
_ROOM = 1 << 16
"""Bytes of the buffer that stored tensors are read into, one after another, if that is enough."""


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    """One checkpoint: the plain model is what was written into it."""

    stored: Stored
    originals: dict[str, Tensor]
    untouched: dict[str, Tensor]
    """Copies of its stored tensors."""
    close: ExitStack


class CodecWalk:
    """One walk; every step checks what it is given, and that nothing else has changed."""

    def __init__(self, suite: type[CodecSuite], draw: random.Random) -> None:
        self._suite = suite
        self._draw = draw
        self._open: list[_Open] = []
        self._kept: list[tuple[str, Tensor, Tensor]] = []
        self._room = torch.zeros(_ROOM, dtype=torch.uint8)
        self._done: list[str] = []
        self._what = ""
        self._num_samples = 0

    def run(self, told: str) -> None:
        """Raises AssertionError with the last steps before the one that went wrong."""
        steps: list[Callable[[_Open], None]] = [
            self._whole, self._pass, self._pass, self._row, self._damage,
            self._ask_again, self._use_up, self._another,
        ]  # fmt: skip
        self._told = told
        try:
            self._begin()
            for _ in range(_NUM_STEPS):
                if self._open:
                    self._draw.choice(steps)(self._draw.choice(self._open))
                else:
                    self._begin()
                self._check_the_rest()
        finally:
            for one in self._open:
                one.close.close()

    def _next(self, step: str) -> None:
        self._done.append(step)
        self._what = f"{self._told}, after {', '.join(self._done[-3:])}"

    def _begin(self) -> None:
        """One more checkpoint. Names come back in others, with other shapes and dtypes."""
        names = self._draw.sample(list(SMALL), self._draw.randint(1, len(SMALL)))
        dtype = DTYPES[self._draw.choice(list(self._suite.dtypes))]
        self._next(f"a checkpoint of {len(names)} in {dtype}")
        more = self._draw.choice([-1, 0, 7, 40])  # layers of one checkpoint are of one shape
        originals = {name: self._sample(name, more, dtype) for name in names}
        stack = ExitStack()
        stored = stack.enter_context(self._suite.stored(originals))
        copies = {name: tensor.clone() for name, tensor in stored.tensors.items()}
        self._open.append(_Open(stored, originals, copies, stack))
        assert stored.encoded.keys() <= originals.keys(), (
            f"{self._what}: expected names of {sorted(originals)}, got {sorted(stored.encoded)}"
        )

    def _sample(self, name: str, more: int, dtype: torch.dtype) -> Tensor:
        shape = tuple(size + more for size in SMALL[name])
        self._num_samples += 1
        return self._suite.sample(dtype, shape, 1000 + self._num_samples)

    def _another(self, one: _Open) -> None:
        """Let go of a checkpoint, or open one more."""
        if len(self._open) < _MOST_OPEN and self._draw.random() < 0.6:
            self._begin()
            return
        self._next("a checkpoint that is closed")
        self._open.remove(one)
        one.close.close()

    def _whole(self, one: _Open) -> None:
        if (name := self._encoded(one)) is None:
            return
        self._next(_short(name))
        self._check(one, name, one.stored.decode(name, self._what))

    def _pass(self, one: _Open) -> None:
        """Some tensors, each of which lies where the one before did, as streamed layers do."""
        names = sorted(one.stored.encoded)
        for name in self._draw.sample(names, self._draw.randint(0, len(names))):
            self._next(f"{_short(name)} in the buffer")
            arguments = self._read(one, one.stored.encoded[name])
            self._check(one, name, decoded(one.stored.encoded[name], arguments, self._what))

    def _read(self, one: _Open, encoded: EncodedTensor) -> list[Tensor]:
        found, end = [], 0
        size = sum(bits(one.stored.tensors[stored]).numel() + 64 for stored in encoded.tensors)
        if size > len(self._room):
            self._room = torch.zeros(size, dtype=torch.uint8)
        for stored in encoded.tensors:
            tensor = one.stored.tensors[stored]
            begin = -(-end // 64) * 64
            end = begin + bits(tensor).numel()
            place = self._room[begin:end]
            place.copy_(bits(tensor))
            found.append(place.view(tensor.dtype).view(tensor.shape))
        return found

    def _row(self, one: _Open) -> None:
        rows = {name: each.row for name, each in one.stored.encoded.items() if each.row is not None}
        if not rows:
            return
        name, row = self._draw.choice(list(rows.items()))
        number = self._draw.randrange(one.stored.encoded[name].shape[0])
        self._next(f"row {number} of {_short(name)}")
        whole = self._read(one, one.stored.encoded[name])
        found = decoded(row, [tensor[number] for tensor in whole], self._what)
        same_pattern(found, one.originals[name][number], self._what)
        self._keep(found)

    def _damage(self, one: _Open) -> None:
        """A damaged bit that the form can tell is told, or changes nothing; what comes next is
        right in any case.
        """
        if (name := self._encoded(one)) is None:
            return
        encoded = one.stored.encoded[name]
        arguments = self._read(one, encoded)
        number = self._draw.randrange(len(arguments))
        if not (raw := bits(arguments[number])).numel():
            return
        stored = encoded.tensors[number]
        self._next(f"a damaged bit in {_short(stored)}")
        raw[self._draw.randrange(len(raw))] ^= 0x10
        found = None
        with suppress(Exception):  # what may be raised is for codec.damage to say
            found = encoded.decode(*arguments)
        if found is not None and self._suite.is_checked(stored):
            same_pattern(found, one.originals[name], self._what)

    def _ask_again(self, one: _Open) -> None:
        """The factory, about this checkpoint, and about one that lacks a tensor."""
        self._next("asking again")
        if self._draw.random() < 0.5 and one.stored.tensors:
            lacking = one.stored.without(self._draw.choice(list(one.stored.tensors)))
            with suppress(CheckpointError):
                self._suite.codec(lacking)
        with suppress(CheckpointError):
            self._suite.codec(CodecRequest({}, {}, {}))
        told = {name: (each.dtype, each.shape) for name, each in one.stored.encoded.items()}
        again = self._suite.codec(one.stored.request)
        found = {name: (each.dtype, each.shape) for name, each in again.items()}
        assert found == told, f"{self._what}: expected {told} as at first, got {found}"

    def _use_up(self, one: _Open) -> None:
        """A result is its caller's, to change or to drop."""
        if not self._kept:
            return
        self._next("changing a result")
        _, mine, _ = self._kept.pop(self._draw.randrange(len(self._kept)))
        bits(mine).bitwise_xor_(0xFF)

    def _encoded(self, one: _Open) -> str | None:
        names = sorted(one.stored.encoded)
        return self._draw.choice(names) if names else None

    def _check(self, one: _Open, name: str, found: Tensor) -> None:
        same_pattern(found, one.originals[name], self._what)
        self._keep(found)

    def _keep(self, found: Tensor) -> None:
        self._kept.append((self._done[-1], found, found.clone()))
        del self._kept[:-_MOST_KEPT]

    def _check_the_rest(self) -> None:
        """Results that are kept, and stored tensors, are what they were."""
        for step, mine, expected in self._kept:
            same_pattern(mine, expected, f"{self._what}: the result of {step}")
        for one in self._open:
            for name, expected in one.untouched.items():
                same_pattern(one.stored.tensors[name], expected, f"{self._what}: stored {name}")


def _short(name: str) -> str:
    """A tensor's name in messages."""
    return name.removeprefix("model.layers.").removesuffix(".weight")
