"""The prefix cache on disk: a store that saves its sequences, and finds them by their tokens."""

from __future__ import annotations

import logging
import threading
from array import array
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from ollm_core.contracts.closing import in_own_thread
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.buffers import round_up
from ollm_core.device.memory import DeviceMemory
from ollm_core.errors import DamagedKVError, DoesNotFitError, KVStoreError, OllmError, ReadError
from ollm_core.kv.disk import marks, readers
from ollm_core.kv.disk.borrowed import common
from ollm_core.kv.disk.borrowing import BorrowingStore, Pin
from ollm_core.kv.disk.budget import KeptBudget
from ollm_core.kv.disk.directory import KVDirectory, find_homes, make_home, open_home
from ollm_core.kv.disk.journal import LayerBlocks, Prefix
from ollm_core.kv.disk.sizes import STAGING_BYTES
from ollm_core.memory.accounts import MemoryAccount

logger = logging.getLogger("ollm")


class PrefixCachingStore(BorrowingStore):
    """A DiskKVStore whose sequences are kept when it is closed (see KeepsPrefixes).

    Full blocks are kept as soon as they are there, so that a process that is killed has kept them;
    at the end of a pass that could have been gone on with, the tokens after them, too.
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
        budget: int | None = None,
    ) -> None:
        """See DiskKVStore. Goes on in a directory inside `directory` that a store of the same model
        left, if there is one that no other process has. `budget` is the most bytes that may be kept
        in `directory`, by all models and runs; None is no limit.
        """
        self._forgotten: list[int] = []
        """Sequences of dropped prefixes, whose blocks somebody may be reading."""
        self._token_ids: dict[int, Tensor] = {}
        """What is known of each sequence's tokens, int32, from its start on."""
        self._num_kept: dict[int, int] = {}
        """Tokens of each sequence that are kept already."""
        self._budget = None if budget is None else KeptBudget(directory, budget)
        homes = (open_home(path, geometry, fingerprint) for path in find_homes(directory))
        home = next((found for found in homes if found), None)
        home = home or make_home(directory, geometry, fingerprint, keeping=True)
        super().__init__(
            geometry,
            account,
            directory,
            fingerprint,
            device_account,
            home,
            staging_bytes=staging_bytes,
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
                return self._fork_of(pin, wanted[:num_tokens]), num_tokens
            except DamagedKVError:
                self._drop_damaged()
            except KVStoreError:  # windows that have moved on: a shorter one may do
                continue
            except (DoesNotFitError, ReadError) as error:
                logger.warning("a cached prefix cannot be used: %s", error)
                break
        return self.new_sequence(), 0

    def keep(self, sequence: int, start: int, token_ids: Tensor) -> None:
        """See KeepsPrefixes."""
        self.keep_tokens(sequence, start, token_ids)
        self.drop_finished(sequence)

    def drop_finished(self, sequence: int) -> None:
        """What a pass of `sequence` has left that it would have needed to be gone on with may go:
        all that it gave is kept. By default nothing was left.
        """

    def keep_tokens(self, sequence: int, start: int, token_ids: Tensor) -> None:
        """As `keep`, where something else is to be kept of the pass before `drop_finished`."""
        known = self._known(sequence, start)
        if len(known) == start:
            self._token_ids[sequence] = torch.cat([known, token_ids.to(torch.int32)])
        num_tokens = min(len(self._known(sequence)), self.num_tokens(sequence))
        num_full = num_tokens - num_tokens % self.block_size
        if num_full > self._num_kept.get(sequence, 0) and self.keeps(sequence):
            self._guarded(sequence, num_full)
        if num_tokens > self._num_kept.get(sequence, 0) and self._finished_keys(sequence):
            self._keep_end(sequence, num_tokens)

    def keeps(self, sequence: int) -> bool:
        """Whether what a sequence adds is kept: not if it is less than what it has borrowed."""
        return self._keeps and self._adds_enough(sequence)

    def turn(self) -> AbstractContextManager[None]:
        """Inside the `with` no other process keeps anything, if there is a budget. Raises
        OSError.
        """
        return nullcontext() if self._budget is None else self._budget.turn()

    def make_room(self, num_bytes: int) -> bool:
        """Whether so many bytes may be kept beside in this `turn`, as states are. What is least
        recently used then goes for it.
        """
        if self._budget is None:
            return True
        home = self._disk.home.directory
        return self._budget.make_room(lambda: num_bytes, home, self._evict) >= num_bytes

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
            if self._budget is not None and self._keeps:
                self._shorten()
        super().close()

    def _fork_of(self, pin: Pin, token_ids: Tensor) -> int:
        """A new sequence that has `token_ids`, which a kept prefix begins with. Raises as `fork`,
        and DamagedKVError.
        """
        sequence = self.fork(pin.sequence, len(token_ids))
        marks.mark_used(pin.home, pin.prefix.key)
        self._num_kept[sequence] = len(token_ids)
        self._token_ids[sequence] = token_ids.clone()
        return sequence

    def _known(self, sequence: int, num_tokens: int | None = None) -> Tensor:
        none = torch.zeros(0, dtype=torch.int32, device="cpu")
        return self._token_ids.get(sequence, none)[:num_tokens]

    def _guarded(self, sequence: int, num_tokens: int) -> None:
        """Keep without ever failing: the answer is worth more than its KV."""
        try:
            with self.turn():
                self._keep(sequence, num_tokens)
        except (OllmError, OSError) as error:
            self._keeps = False
            logger.warning("the prefix cache is not saved: %s", error)

    def _keep_end(self, sequence: int, num_tokens: int) -> None:
        """Keep all tokens of a sequence that goes on, those in its last block too. What fails costs
        no more than these.
        """
        if not self.keeps(sequence) or num_tokens != self.num_tokens(sequence):
            return
        num_full = self._num_kept.get(sequence, 0)
        try:
            with self.turn():
                self._keep(sequence, num_tokens, goes_on=True)
        except (OllmError, OSError) as error:
            self._num_kept[sequence] = num_full
            logger.info("the end of a prompt is kept when all is done: %s", error)

    def _keep(self, sequence: int, num_tokens: int, *, goes_on: bool = False) -> None:
        """Write the first `num_tokens` of a sequence into the journal, and drop the prefixes that
        they begin with. A part of a block is where the sequence has it, unless it `goes_on` in it:
        a copy is then kept. Raises OllmError or OSError.
        """
        self._num_kept[sequence] = num_tokens
        num_tokens = self._within_budget(sequence, num_tokens)
        token_ids = self._known(sequence, num_tokens)
        held = (number for _, number in self._matches(token_ids))
        if not num_tokens or num_tokens in held:
            return
        self._copy_borrowed(sequence)
        self._disk.flush()
        if not num_tokens % self.block_size:
            pinned = super().fork(sequence, num_tokens)  # full blocks: nothing is copied
        elif goes_on:
            pinned = self._with_copied_end(sequence)
        else:
            super().truncate(sequence, num_tokens)  # no unknown tokens in its last block
            self._write_tails(sequence)
            pinned = sequence
        prefix = Prefix(array("i", token_ids.tolist()), self._layers_of(pinned))
        self._disk.home.keep(prefix)
        for pin in self._replaced_by(token_ids):
            self._drop(pin)
        self._pins.append(Pin(pinned, prefix, token_ids, self._disk.home.directory))

    def _with_copied_end(self, sequence: int) -> int:
        """A new sequence that has all of another, its last block as a copy on disk. Raises
        OllmError or OSError.
        """
        copied = self.new_sequence()
        try:
            for layer_idx, (source, table) in enumerate(
                zip(self._tables[sequence], self._tables[copied], strict=True)
            ):
                self.copy_end(layer_idx, source, table, 0)
        except BaseException:
            super().release(copied)
            raise
        return copied

    def _layers_of(self, sequence: int) -> tuple[LayerBlocks, ...]:
        """Where each layer has what is stored of a sequence, all of it written."""
        return tuple(
            LayerBlocks(
                first,
                array("I", blocks),
                array("Q", (self._disk.checksums[layer_idx, block] for block in blocks)),
            )
            for layer_idx, (first, blocks) in enumerate(self._blocks_of(sequence))
        )

    def _replaced_by(self, token_ids: Tensor) -> list[Pin]:
        """The prefixes that these tokens begin with, but for those that the user has pinned."""
        return [
            pin
            for pin in self._pins
            if common(pin.token_ids, token_ids) == len(pin.token_ids)
            and not marks.is_pinned(pin.home, pin.prefix.key)
        ]

    def _within_budget(self, sequence: int, num_tokens: int) -> int:
        """How many of the first `num_tokens` of a sequence may be kept: all, or full blocks."""
        if self._budget is None:
            return num_tokens
        slots = list(map(round_up, map(self.geometry.block_bytes, range(self.geometry.num_layers))))
        going = [pin.prefix.key for pin in self._replaced_by(self._known(sequence, num_tokens))]
        going += self._finished_keys(sequence)

        def needed() -> int:
            shared = {
                (layer_idx, block)
                for pin in self._pins
                if pin.prefix.key not in going
                for layer_idx, (_, blocks) in enumerate(self._blocks_of(pin.sequence))
                for block in blocks
            }
            return sum(
                slots[layer_idx]
                for layer_idx, (first, blocks) in enumerate(self._blocks_of(sequence))
                for block in blocks[: -(-num_tokens // self.block_size) - first]
                if (layer_idx, block) not in shared
            )

        home = self._disk.home.directory
        room = self._budget.make_room(needed, home, self._evict, going)
        if room >= needed():
            return num_tokens
        fitting = min(room // sum(slots) * self.block_size, num_tokens)
        fitting -= fitting % self.block_size
        if not self.can_truncate(sequence, fitting):
            fitting = 0
        self._budget.tell(fitting)
        return fitting

    def _finished_keys(self, sequence: int) -> list[bytes]:
        """Of what `drop_finished` will drop."""
        return []

    def _evict(self, key: bytes) -> bool:
        """Forget what is kept here by that key; returns whether it was."""
        for pin in self._pins:
            if pin.prefix.key == key:
                with suppress(OSError):
                    self._drop(pin)
                    return True
        return False

    def _shorten(self) -> None:
        """Give the disk back what is not kept. Nothing may be read after that."""
        with suppress(OllmError):
            self._disk.flush()
            self._disk.home.shorten(
                list(map(self.geometry.block_bytes, range(self.geometry.num_layers)))
            )

    def _drop(self, pin: Pin) -> None:
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
        self._refuse_damaged(damaged)
        for pin in [pin for pin in self._pins if self._has_any(pin, damaged)]:
            logger.warning(
                "a cached prefix of %d tokens is damaged, and not used", len(pin.token_ids)
            )
            with suppress(OSError):
                self._drop(pin)

    def _move_to_longer(self, token_ids: Tensor) -> bool:
        """Go on in another directory that has more of these tokens, as long as nothing is stored
        here and no other process has that one. Returns whether it did.
        """
        return self._may_move() and any(
            self._move_to(path) for _, path in self._longer(token_ids, 1)
        )

    def _held(self) -> set[int]:
        """The sequences that nobody goes on with."""
        return {*(pin.sequence for pin in self._pins), *self._forgotten}

    def _may_move(self) -> bool:
        """Whether nothing is stored but what is kept, and nothing read in other homes."""
        others = self._tables.keys() - self._held()
        return not (self._loans or any(self._blocks_of(sequence)[0][1] for sequence in others))

    def _move_to(self, path: Path) -> bool:
        """Go on in another directory, if no other process has it. Only after `_may_move`."""
        home = open_home(path, self.geometry, self._fingerprint)
        if home is None:
            return False
        self._leave(self._held())
        self._forgotten.clear()
        self._disk.move(home)
        self._pin_all(home)
        return True

    def _pin_all(self, home: KVDirectory) -> None:
        """Hold the blocks of all that is kept in `home`."""
        self._pins = self._hold(home.prefixes, home.directory)
