"""The prefix cache on disk: a store that saves its sequences, and finds them by their tokens."""

from __future__ import annotations

import logging
import threading
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ollm_core.contracts.closing import in_own_thread
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.memory import DeviceMemory
from ollm_core.errors import DamagedKVError, DoesNotFitError, KVStoreError, OllmError, ReadError
from ollm_core.kv.disk import readers
from ollm_core.kv.disk.borrowed import (
    BorrowedHome,
    OtherHomes,
    borrow_home,
    common,
    contents_of,
    tokens_of,
)
from ollm_core.kv.disk.directory import KVDirectory, find_homes, make_home, open_home
from ollm_core.kv.disk.journal import LayerBlocks, Prefix
from ollm_core.kv.disk.sizes import STAGING_BYTES
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.memory.accounts import MemoryAccount

logger = logging.getLogger("ollm")


_MAX_BORROWED = 8
"""Homes that are read at once: each has a file per layer open."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pin:
    """A kept prefix and the sequence that holds its blocks."""

    sequence: int
    prefix: Prefix
    token_ids: Tensor
    """int32 [T]."""


@dataclass(frozen=True, slots=True, eq=False)
class _Loan:
    """What is read in the home of another process."""

    home: BorrowedHome
    pins: list[_Pin]
    """Without those that turned out to be damaged."""
    sequences: list[int]
    """All that hold its blocks for as long as it is borrowed: none is ever free to be written."""


class PrefixCachingStore(DiskKVStore):
    """A DiskKVStore whose sequences are kept when it is closed (see KeepsPrefixes).

    Full blocks are kept as soon as they are there, so that a process that is killed has kept them.
    A kept block is never written again: a sequence that goes on inside it has a copy of its own.
    While others read what this store keeps, it also keeps the blocks of what it has forgotten.

    What other processes keep is read in their homes, and never copied unless a sequence has added
    at least as much to it: less is not kept.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        account: MemoryAccount,
        directory: Path,
        fingerprint: str,
        device_account: MemoryAccount | None = None,
        *,
        staging_bytes: int = STAGING_BYTES,
        memory: DeviceMemory | None = None,
    ) -> None:
        """See DiskKVStore. Goes on in a directory inside `directory` that a store of the same model
        left, if there is one that no other process has.
        """
        self._others = OtherHomes(directory, geometry, fingerprint)
        self._loans: dict[int, _Loan] = {}
        """By where the blocks of the home begin."""
        self._refused: set[bytes] = set()
        """What others keep, and is damaged."""
        self._forgotten: list[int] = []
        """Sequences of dropped prefixes, whose blocks somebody may be reading."""
        self._fingerprint = fingerprint
        self._token_ids: dict[int, Tensor] = {}
        """What is known of each sequence's tokens, int32, from its start on."""
        self._num_kept: dict[int, int] = {}
        """Tokens of each sequence that are kept already."""
        self._pins: list[_Pin] = []
        homes = (open_home(path, geometry, fingerprint) for path in find_homes(directory))
        home = next((found for found in homes if found), None)
        home = home or make_home(directory, geometry, fingerprint, keeping=True)
        super().__init__(
            geometry,
            account,
            directory,
            fingerprint,
            device_account,
            staging_bytes=staging_bytes,
            home=home,
            memory=memory,
        )
        self._keeps = home.journal is not None
        self._pin_all(home)

    def find(self, token_ids: Tensor) -> tuple[int, int]:
        """See KeepsPrefixes. Less than a block is left out, unless it is half of what is asked
        for: it would only shift the chunks.
        """
        wanted = token_ids.to(torch.int32)
        least = max(min(self.block_size, -(-len(wanted) // 2)), 1)
        self._drop_damaged()
        self._release_forgotten()
        self._return_unused()
        if not self._move_to_longer(wanted):
            self._borrow_longer(wanted, least)
        for pin, num_tokens in self._matches(wanted):
            if num_tokens < least:
                break
            try:
                sequence = self.fork(pin.sequence, num_tokens)
            except DamagedKVError:
                self._drop_damaged()
            except KVStoreError:  # windows that have moved on: a shorter one may do
                continue
            except (DoesNotFitError, ReadError) as error:
                logger.warning("a cached prefix cannot be used: %s", error)
                return self.new_sequence(), 0
            else:
                self._num_kept[sequence] = num_tokens
                self._token_ids[sequence] = wanted[:num_tokens].clone()
                return sequence, num_tokens
        return self.new_sequence(), 0

    def keep(self, sequence: int, start: int, token_ids: Tensor) -> None:
        """See KeepsPrefixes."""
        known = self._known(sequence, start)
        if len(known) == start:
            self._token_ids[sequence] = torch.cat([known, token_ids.to(torch.int32)])
        num_tokens = min(len(self._known(sequence)), self.num_tokens(sequence))
        num_full = num_tokens - num_tokens % self.block_size
        if num_full > self._num_kept.get(sequence, 0) and self.keeps(sequence):
            self._guarded(sequence, num_full)

    def keeps(self, sequence: int) -> bool:
        """Whether what a sequence adds is kept: not if it is less than what it has borrowed."""
        if not self._keeps:
            return False
        borrowed = own = 0
        for layer_idx, (_, blocks) in enumerate(self._blocks_of(sequence) if self._loans else ()):
            num_borrowed = sum(map(bool, map(self._disk.home_of, blocks)))
            block_bytes = self.geometry.block_bytes(layer_idx)
            borrowed += num_borrowed * block_bytes
            own += (len(blocks) - num_borrowed) * block_bytes
        return borrowed <= own

    def token_ids(self, sequence: int) -> Tensor:
        """What is known of a sequence's tokens, int32 [T], from its start on."""
        return self._known(sequence)

    def truncate(self, sequence: int, num_tokens: int) -> None:
        super().truncate(sequence, num_tokens)
        self._token_ids[sequence] = self._known(sequence, num_tokens)
        self._num_kept[sequence] = min(self._num_kept.get(sequence, 0), num_tokens)

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        forked = super().fork(sequence, num_tokens)
        self._token_ids[forked] = self._known(sequence, self.num_tokens(forked))
        self._num_kept[forked] = min(self._num_kept.get(sequence, 0), self.num_tokens(forked))
        return forked

    def release(self, sequence: int) -> None:
        super().release(sequence)
        self._token_ids.pop(sequence, None)
        self._num_kept.pop(sequence, None)

    def close(self) -> None:
        """See KVStore. Before that, keeps what the sequences hold, their unfinished blocks too."""
        if in_own_thread():  # the garbage collector may ask for it there, and keeping waits for it
            threading.Thread(target=self.close).start()
            return
        if not self._closed and self._keeps:
            for sequence in list(self._token_ids):
                num_tokens = min(len(self._known(sequence)), self.num_tokens(sequence))
                if num_tokens > self._num_kept.get(sequence, 0) and self.keeps(sequence):
                    self._guarded(sequence, num_tokens)
        super().close()

    def _known(self, sequence: int, num_tokens: int | None = None) -> Tensor:
        none = torch.zeros(0, dtype=torch.int32, device="cpu")
        return self._token_ids.get(sequence, none)[:num_tokens]

    def _guarded(self, sequence: int, num_tokens: int) -> None:
        """Keep without ever failing: the answer is worth more than its KV."""
        try:
            self._keep(sequence, num_tokens)
        except (OllmError, OSError) as error:
            self._keeps = False
            logger.warning("the prefix cache is not saved: %s", error)

    def _keep(self, sequence: int, num_tokens: int) -> None:
        """Write the first `num_tokens` of a sequence into the journal, and drop the prefixes that
        they begin with. A part of a block is kept only when the store is closing: the sequence must
        not go on after that. Raises OllmError or OSError.
        """
        token_ids = self._known(sequence, num_tokens)
        self._num_kept[sequence] = num_tokens
        if any(number == num_tokens for _, number in self._matches(token_ids)):
            return
        self._copy_borrowed(sequence)
        self._disk.flush()
        if num_tokens % self.block_size:
            super().truncate(sequence, num_tokens)  # no unknown tokens in its last block
            self._write_tails(sequence)
            pinned = sequence
        else:
            pinned = super().fork(sequence, num_tokens)
        layers = tuple(
            LayerBlocks(
                first,
                array("I", blocks),
                array("Q", (self._disk.checksums[layer_idx, block] for block in blocks)),
            )
            for layer_idx, (first, blocks) in enumerate(self._blocks_of(pinned))
        )
        prefix = Prefix(array("i", token_ids.tolist()), layers)
        self._disk.home.keep(prefix)
        for pin in [*self._pins]:
            if common(pin.token_ids, token_ids) == len(pin.token_ids):
                self._drop(pin)
        self._pins.append(_Pin(pinned, prefix, token_ids))

    def _drop(self, pin: _Pin) -> None:
        """Forget a prefix, first on disk: only then its blocks may be used again, when nobody reads
        them. Raises OSError with the prefix still held.
        """
        self._pins.remove(pin)
        self._disk.home.drop(pin.prefix)
        self._forgotten.append(pin.sequence)
        self._release_forgotten()

    def _release_forgotten(self) -> None:
        """Who enters after a prefix was dropped does not find it: one look without readers is
        enough.
        """
        if self._forgotten and not readers.are_there(self._disk.home.directory):
            while self._forgotten:
                self.release(self._forgotten.pop())

    def _drop_damaged(self) -> None:
        """Forget the prefixes with a block that was found damaged."""
        damaged = {*self._disk.damaged}
        if not damaged:
            return
        for pins in (self._pins, *(loan.pins for loan in self._loans.values())):
            for pin in [*pins]:
                layers = enumerate(self._blocks_of(pin.sequence))
                if any((i, block) in damaged for i, (_, blocks) in layers for block in blocks):
                    logger.warning(
                        "a cached prefix of %d tokens is damaged, and not used", len(pin.token_ids)
                    )
                    if pins is self._pins:
                        with suppress(OSError):
                            self._drop(pin)
                    else:
                        pins.remove(pin)
                        self._refused.add(_named(pin.prefix))

    def _matches(self, token_ids: Tensor) -> list[tuple[_Pin, int]]:
        """The prefixes, and how many of these tokens each has; the one with most first."""
        borrowed = (pin for loan in self._loans.values() for pin in loan.pins)
        found = [(pin, common(pin.token_ids, token_ids)) for pin in (*self._pins, *borrowed)]
        return sorted(found, key=lambda one: one[1], reverse=True)

    def _move_to_longer(self, token_ids: Tensor) -> bool:
        """Go on in another directory that has more of these tokens, as long as nothing is stored
        here and no other process has that one. Returns whether it did.
        """
        held = {*(pin.sequence for pin in self._pins), *self._forgotten}
        if self._loans or any(
            self._blocks_of(sequence)[0][1] for sequence in self._tables.keys() - held
        ):
            return False
        for _, path in self._longer(token_ids, 1):
            home = open_home(path, self.geometry, self._fingerprint)
            if home:
                self._leave(held)
                self._forgotten.clear()
                self._disk.move(home)
                self._pin_all(home)
                return True
        return False

    def _borrow_longer(self, token_ids: Tensor, least: int) -> None:
        """Read in the home of another process that has a block more of these tokens than there is
        here, or enough where there is not.
        """
        here = max((number for _, number in self._matches(token_ids)), default=0)
        more = self.block_size if here >= least else least - here
        for _, path in self._longer(token_ids, more):
            loans = (at for at, loan in self._loans.items() if loan.home.directory == path)
            first = next(loans, None)
            if first is None and len(self._loans) < _MAX_BORROWED:
                home = borrow_home(path, self.geometry, self._fingerprint)
                if home:
                    first = self._disk.borrow(home)
                    self._loans[first] = _Loan(home, [], [])
            if first is not None and self._read_loan(first):
                return

    def _read_loan(self, first: int) -> bool:
        """Hold what the owner has kept since. Returns whether that is anything."""
        loan = self._loans[first]
        known = {pin.prefix.key for pin in loan.pins} | self._refused
        new = [one for one in loan.home.prefixes() if not {one.key, _named(one)} & known]
        pins = self._hold(new, first, loan.sequences)
        loan.pins.extend(pins)
        loan.sequences.extend(pin.sequence for pin in pins)
        return bool(pins)

    def _longer(self, token_ids: Tensor, more: int) -> list[tuple[int, Path]]:
        """Homes that have at least so many more of these tokens than there are here."""
        here = max((number for _, number in self._matches(token_ids)), default=0)
        found = self._others.matches(token_ids, [self._disk.home.directory])
        return [one for one in found if one[0] >= here + more]

    def _return_unused(self) -> None:
        """Let go of borrowed homes that no sequence has blocks of: their owners may then forget,
        and what they have kept since is found.
        """
        if not self._loans:
            return
        holding = {number for loan in self._loans.values() for number in loan.sequences}
        used = {
            self._disk.home_of(block)
            for sequence in self._tables.keys() - holding
            for _, blocks in self._blocks_of(sequence)
            for block in blocks
        }
        for first in self._loans.keys() - used:
            for sequence in self._loans.pop(first).sequences:
                self.release(sequence)
            self._disk.give_home_back(first)

    def _copy_borrowed(self, sequence: int) -> None:
        """Let a sequence have blocks of its own in place of borrowed ones. Raises OllmError."""
        for layer_idx, table in enumerate(self._tables[sequence] if self._loans else ()):
            for index, block in table.blocks.items():
                if self._disk.home_of(block):
                    self._manager.copy_block(layer_idx, table, index)

    def _pin_all(self, home: KVDirectory) -> None:
        """Hold the blocks of all that is kept in `home`."""
        self._pins = self._hold(home.prefixes, 0)

    def _hold(
        self, prefixes: Sequence[Prefix], first: int, beside: Iterable[int] = ()
    ) -> list[_Pin]:
        """Sequences with the blocks of `prefixes`, in a home whose blocks begin at `first` and
        which the sequences `beside` have blocks of.
        """
        held = [
            (
                len(one.token_ids),
                [(layer.first, [first + block for block in layer.blocks]) for layer in one.layers],
            )
            for one in prefixes
        ]
        for layer_idx, block, number in contents_of(prefixes):
            self._disk.checksums[layer_idx, first + block] = number
        return [
            _Pin(sequence, one, tokens_of(one))
            for sequence, one in zip(self._adopt(held, beside), prefixes, strict=True)
        ]

    def _write_tails(self, sequence: int) -> None:
        for layer_idx, table in enumerate(self._tables[sequence]):
            if table.tail is not None:
                num_tokens = table.num_tokens % self.block_size
                block = table.blocks[table.num_tokens // self.block_size]
                self._disk.write_part(layer_idx, block, table.tail, num_tokens)


def _named(prefix: Prefix) -> bytes:
    """Names a prefix as it was kept at one time: what is kept again has other blocks."""
    return prefix.key + prefix.seconds.to_bytes(8, "little")
