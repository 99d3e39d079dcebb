"""Random walks over a weight streamer: units in any order, two at a time, broken off, and rows of
the embedding between them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from ollm_conformance.compare import same_bits
from ollm_conformance.parts.tiny_weights import NUM_UNITS, Model
from ollm_core.testing import WeightStreamer

_NUM_STEPS = 60


class _Broken(Exception):
    """Ends a pass in the middle."""


class WeightWalk:
    """One walk; every step checks what it is given, and what is still in use after it."""

    def __init__(
        self, streamer: WeightStreamer, model: Model, dtype: torch.dtype, draw: random.Random
    ) -> None:
        self._streamer = streamer
        self._model = model
        self._dtype = dtype
        self._draw = draw
        self._done: list[str] = []

    def run(self, told: str) -> None:
        """Raises AssertionError with the last steps before the one that went wrong."""
        steps: list[Callable[[], None]] = [self._passes, self._two, self._broken, self._rows]
        for _ in range(_NUM_STEPS):
            self._told = told
            self._draw.choice(steps)()

    def _next(self, step: str) -> None:
        self._done.append(step)
        self._what = f"{self._told}, after {', '.join(self._done[-4:])}"

    def _passes(self) -> None:
        first = self._draw.randrange(NUM_UNITS)
        count = self._draw.randint(1, 2 * NUM_UNITS)
        self._next(f"{count} units from {first} on")
        order = [(first + number) % NUM_UNITS for number in range(count)]
        self._model.walk(self._streamer, self._what, self._dtype, order)

    def _two(self) -> None:
        """A unit and the next, with rows of the embedding while both are in use."""
        one = self._draw.randrange(NUM_UNITS - 1)
        self._next(f"units {one} and {one + 1} at once")
        with self._streamer.acquire(one) as first:
            if self._draw.random() < 0.5:
                self._embed()
            with self._streamer.acquire(one + 1) as second:
                self._embed()
                self._model.check(one + 1, second, self._what, self._dtype)
            self._model.check(one, first, self._what, self._dtype)

    def _broken(self) -> None:
        one = self._draw.randrange(NUM_UNITS - 1)
        self._next(f"a pass that ends at unit {one}")
        with suppress(_Broken), self._streamer.acquire(one) as first:
            if self._draw.random() < 0.5:
                with self._streamer.acquire(one + 1) as second:
                    self._model.check(one + 1, second, self._what, self._dtype)
                    raise _Broken
            self._model.check(one, first, self._what, self._dtype)
            raise _Broken

    def _rows(self) -> None:
        self._next("rows of the embedding")
        for _ in range(self._draw.randint(1, 3)):
            self._embed()

    def _embed(self) -> None:
        """Rows, which are the caller's to change."""
        table = self._model.embedding
        count = self._draw.choice([1, 1, 5, 40])
        ids = torch.tensor([self._draw.randrange(len(table)) for _ in range(count)])
        rows: Tensor = self._streamer.embed(ids)
        same_bits(rows, table[ids].to(self._dtype), f"{self._what}: rows {ids.tolist()}")
        rows.fill_(7)
