"""A store on disk that also reads, by reference, what other processes keep in their homes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.memory import DeviceMemory
from ollm_core.kv.disk.borrowed import (
    BorrowedHome,
    OtherHomes,
    borrow_home,
    common,
    contents_of,
    tokens_of,
)
from ollm_core.kv.disk.directory import KVDirectory
from ollm_core.kv.disk.journal import Prefix
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.memory.accounts import MemoryAccount

_MAX_BORROWED = 8
"""Homes that are read at once: each has a file per layer open."""


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """A kept prefix and the sequence that holds its blocks."""

    sequence: int
    prefix: Prefix
    token_ids: Tensor
    """int32 [T]."""
    home: Path


@dataclass(frozen=True, slots=True, eq=False)
class _Loan:
    """What is read in the home of another process."""

    home: BorrowedHome
    pins: list[Pin]
    """Without those that turned out to be damaged."""
    sequences: list[int]
    """All that hold its blocks for as long as it is borrowed: none is ever free to be written."""


class BorrowingStore(DiskKVStore):
    """A DiskKVStore that holds what is kept in its home, and beside it in those of other processes.

    Blocks of others are never written, and never copied but by `_copy_borrowed`: the sequences of a
    loan hold them until it is given back, so that to every other sequence they are shared.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        account: MemoryAccount,
        directory: Path,
        fingerprint: str,
        device_account: MemoryAccount | None,
        home: KVDirectory,
        *,
        staging_bytes: int,
        memory: DeviceMemory | None,
    ) -> None:
        """See DiskKVStore; other homes are looked for in `directory`."""
        self._fingerprint = fingerprint
        self._others = OtherHomes(directory, geometry, fingerprint)
        self._pins: list[Pin] = []
        """What is kept in our own home."""
        self._loans: dict[int, _Loan] = {}
        """By where the blocks of the home begin."""
        self._refused: set[bytes] = set()
        """What others keep, and is damaged."""
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

    def _adds_enough(self, sequence: int) -> bool:
        """Whether a sequence has as much of its own as it has borrowed."""
        borrowed = own = 0
        for layer_idx, (_, blocks) in enumerate(self._blocks_of(sequence) if self._loans else ()):
            num_borrowed = sum(map(bool, map(self._disk.home_of, blocks)))
            block_bytes = self.geometry.block_bytes(layer_idx)
            borrowed += num_borrowed * block_bytes
            own += (len(blocks) - num_borrowed) * block_bytes
        return borrowed <= own

    def _refuse_damaged(self, damaged: set[tuple[int, int]]) -> None:
        """Find no more what others keep with one of these blocks. It is theirs to drop."""
        for loan in self._loans.values():
            for pin in [pin for pin in loan.pins if self._has_any(pin, damaged)]:
                loan.pins.remove(pin)
                self._refused.add(_named(pin.prefix))

    def _has_any(self, pin: Pin, damaged: set[tuple[int, int]]) -> bool:
        layers = enumerate(self._blocks_of(pin.sequence))
        return any((i, block) in damaged for i, (_, blocks) in layers for block in blocks)

    def _matches(self, token_ids: Tensor) -> list[tuple[Pin, int]]:
        """The prefixes, and how many of these tokens each has; the one with most first."""
        borrowed = (pin for loan in self._loans.values() for pin in loan.pins)
        found = [(pin, common(pin.token_ids, token_ids)) for pin in (*self._pins, *borrowed)]
        return sorted(found, key=lambda one: one[1], reverse=True)

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
        pins = self._hold(new, loan.home.directory, first, loan.sequences)
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

    def _hold(
        self, prefixes: Sequence[Prefix], home: Path, first: int = 0, beside: Iterable[int] = ()
    ) -> list[Pin]:
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
            Pin(sequence, one, tokens_of(one), home)
            for sequence, one in zip(self._adopt(held, beside), prefixes, strict=True)
        ]


def _named(prefix: Prefix) -> bytes:
    """Names a prefix as it was kept at one time: what is kept again has other blocks."""
    return prefix.key + prefix.seconds.to_bytes(8, "little")
