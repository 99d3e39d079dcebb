"""Sequences that are kept in a store for requests that begin like them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ollm_core.contracts.kv import KVStore
from ollm_core.errors import DamagedKVError, DoesNotFitError, KVStoreError
from ollm_core.kv.disk.borrowed import common

MOST = 64


@dataclass(slots=True, eq=False)
class _Kept:
    """Tokens that a store has, int32 [T], and the sequence that holds them."""

    sequence: int
    token_ids: Tensor


@dataclass(slots=True)
class Prefixes:
    """Sequences that nobody goes on with. Each request that begins like one takes a fork of it; the
    one that was used least lately goes first, where memory is short or there are too many.
    """

    store: KVStore
    whole: bool = False
    """Whether a sequence can be gone on with at its end alone, as recurrent states can."""
    most: int = MOST
    _kept: list[_Kept] = field(default_factory=list)

    def keep(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Take over a sequence that holds `token_ids`."""
        new = _Kept(sequence, as_tensor(token_ids))
        for one in [] if self.whole else [*self._kept]:
            if common(one.token_ids, new.token_ids) == len(one.token_ids):
                self._drop(one)
        self._kept.append(new)
        while len(self._kept) > self.most:
            self._drop(self._kept[0])

    def longest(self, token_ids: Tensor) -> int:
        """Of how many of the first `token_ids` there is a sequence."""
        return max((common(one.token_ids, token_ids) for one in self._kept), default=0)

    def fork(self, token_ids: Tensor, longer_than: int = 0) -> tuple[int, int] | None:
        """A new sequence that begins with as many of `token_ids` as can be, and how many; None
        where there are no more than `longer_than`. A model with recurrent states goes on from whole
        sequences alone.
        """
        found = [(common(one.token_ids, token_ids), one) for one in self._kept]
        found.sort(key=lambda pair: -pair[0])
        for num_tokens, one in found:
            if num_tokens <= longer_than:
                return None
            with suppress(KVStoreError, DamagedKVError, DoesNotFitError):
                sequence = self.store.fork(one.sequence, num_tokens)
                self._kept.remove(one)
                self._kept.append(one)  # used last
                return sequence, num_tokens
        return None

    def cached(self) -> list[tuple[tuple[int, int], Tensor]]:
        """Of each, its sequence and length, and its tokens, int32 [T]; the one used last is the
        last. From any thread.
        """
        return [((one.sequence, len(one.token_ids)), one.token_ids) for one in [*self._kept]]

    def give_way(self) -> bool:
        """Free the one that was used least lately; False if there is none."""
        if self._kept:
            self._drop(self._kept[0])
            return True
        return False

    def clear(self) -> None:
        """Free all."""
        while self.give_way():
            pass

    def _drop(self, one: _Kept) -> None:
        self._kept.remove(one)
        self.store.release(one.sequence)


def as_tensor(token_ids: Iterable[int]) -> Tensor:
    """int32 [T]."""
    return torch.tensor(list(token_ids), dtype=torch.int32, device="cpu")
