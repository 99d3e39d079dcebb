"""A prefix cache that finds unfinished prompts, and holds the blocks of their layers done."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ollm_core.contracts.closing import in_own_thread
from ollm_core.errors import DamagedKVError, DoesNotFitError, KVStoreError, ReadError
from ollm_core.kv.disk.borrowed import common, contents_of, tokens_of
from ollm_core.kv.disk.directory import KVDirectory, find_homes, home_fields
from ollm_core.kv.disk.layer_file import VERSION
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.kv.disk.unfinished import Unfinished, read_unfinished, unfinished_files


@dataclass(slots=True, eq=False)
class HeldPass:
    """An unfinished prompt, and the sequence that holds the blocks of its layers done."""

    sequence: int
    one: Unfinished
    token_ids: Tensor
    """int32 [T], all."""
    finished_by: int | None = None
    """The sequence whose pass has come to its end."""


class PassHoldingStore(PrefixCachingStore):
    """A PrefixCachingStore that begins a prompt as a pass did which was broken off, if that is
    further than any prefix. A sequence of its own holds the blocks of each such pass.
    """

    _passes: list[HeldPass]

    def find(self, token_ids: Tensor) -> tuple[int, int]:
        """See KeepsPrefixes and KeepsCheckpoints."""
        wanted = token_ids.to(torch.int32)
        self._move_to_pass(wanted)
        held = self._pass_of(wanted)
        sequence = None if held is None else self._beginning_of(held)
        if held is None or sequence is None:
            return super().find(token_ids)
        return sequence, held.one.start

    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        for held in [one for one in self._passes if one.finished_by is not None]:
            self._drop_pass(held)
        super().reserve(sequence, num_tokens, longest)

    def release(self, sequence: int) -> None:
        for held in [one for one in self._passes if one.finished_by == sequence]:
            self._drop_pass(held)
        super().release(sequence)

    def drop_finished(self, sequence: int) -> None:
        """Also what another pass has left over tokens that the sequence now has."""
        if self._passes:
            known = self.token_ids(sequence)[: self.num_tokens(sequence)]
            for held in [*self._passes]:
                covered = common(held.token_ids, known) == len(held.token_ids)
                if covered or held.finished_by == sequence:
                    self._drop_pass(held)

    def close(self) -> None:
        if not self._closed and not in_own_thread():
            for held in [*self._passes]:
                if held.finished_by is not None or not held.one.num_done:
                    self._drop_pass(held)
        super().close()

    # Who holds what.

    def _pin_all(self, home: KVDirectory) -> None:
        super()._pin_all(home)
        prefixes = [one.prefix for one in home.unfinished]
        for layer_idx, block, number in contents_of(prefixes):
            self._disk.checksums[layer_idx, block] = number
        sequences = self._adopt(
            [
                (
                    len(one.token_ids),
                    [(layer.first, list(layer.blocks)) for layer in one.layers],
                )
                for one in prefixes
            ],
            beside=[pin.sequence for pin in self._pins],
        )
        self._passes = [
            HeldPass(sequence, one, tokens_of(one.prefix))
            for sequence, one in zip(sequences, home.unfinished, strict=True)
        ]

    def _held(self) -> set[int]:
        return {*super()._held(), *(held.sequence for held in self._passes)}

    def _evict(self, key: bytes) -> bool:
        for held in self._passes:
            if held.one.key == key:
                self._drop_pass(held)
                return True
        return super()._evict(key)

    def _finished_keys(self, sequence: int) -> list[bytes]:
        return [held.one.key for held in self._passes if held.finished_by == sequence]

    def _drop_pass(self, held: HeldPass) -> None:
        self._passes.remove(held)
        with suppress(OSError):
            self._disk.home.drop_unfinished(held.one)
        self.release(held.sequence)

    # Which one is gone on with.

    def _pass_of(self, wanted: Tensor) -> HeldPass | None:
        """The unfinished prompt that begins with `wanted`, if it is further than any prefix."""
        alike = [one for one in self._passes if _begins(one.one, one.token_ids, wanted)]
        best = max(alike, key=lambda held: held.one.worth, default=None)
        return best if best and best.one.worth > self._longest(wanted) else None

    def _longest(self, wanted: Tensor) -> int:
        """How many of these tokens are kept, here or in other homes."""
        here = max((number for _, number in self._matches(wanted)), default=0)
        others = self._others.matches(wanted, [self._disk.home.directory])
        return max(here, others[0][0] if others else 0)

    def _beginning_of(self, held: HeldPass) -> int | None:
        """A new sequence with what the pass came after; None if that is kept no more."""
        if not held.one.start:
            return self.new_sequence()
        beginning = held.token_ids[: held.one.start]
        if all(number < len(beginning) for _, number in self._matches(beginning)):
            self._borrow_longer(beginning, len(beginning))
        for pin, number in self._matches(beginning):
            with suppress(KVStoreError, DoesNotFitError, ReadError, DamagedKVError):
                if number == len(beginning):
                    return self._fork_of(pin, beginning)
        return None

    def _move_to_pass(self, wanted: Tensor) -> None:
        """Go on in another directory that has an unfinished prompt which is further than what is
        here, as `_move_to_longer` does.
        """
        if not self._may_move():
            return
        fields = {"version": VERSION, **home_fields(self.geometry, self._fingerprint)}
        own, parent = self._disk.home.directory, self._disk.home.directory.parent
        files = [
            path for home in find_homes(parent) if home != own for path in unfinished_files(home)
        ]
        if not files:
            return
        best = max(
            (one.one.worth for one in self._passes if _begins(one.one, one.token_ids, wanted)),
            default=0,
        )
        best = max(best, self._longest(wanted))
        for path in files:
            with suppress(OSError, KVStoreError):
                found, one = read_unfinished(path)
                alike = found == fields and _begins(one, tokens_of(one.prefix), wanted)
                if alike and one.worth > best and self._move_to(path.parent):
                    best = one.worth


def _begins(one: Unfinished, token_ids: Tensor, wanted: Tensor) -> bool:
    """Whether an unfinished prompt of `token_ids` is the one of which `wanted` is to be found: all
    of its tokens, or all but the last one, whose logits choose the next.
    """
    alike = len(token_ids) - 1 <= len(wanted) == common(token_ids, wanted)
    return alike and one.num_done > 0 and one.start <= len(wanted)
