"""The prefix cache on disk: a store that saves its sequences, and finds them by their tokens."""

from __future__ import annotations

import logging
import threading
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ollm_core.contracts.closing import in_own_thread
from ollm_core.contracts.kv import KVGeometry
from ollm_core.device.memory import DeviceMemory
from ollm_core.errors import DamagedKVError, DoesNotFitError, KVStoreError, OllmError, ReadError
from ollm_core.kv.disk.directory import KVDirectory, find_homes, make_home, open_home
from ollm_core.kv.disk.journal import LayerBlocks, Prefix, read_journal
from ollm_core.kv.disk.sizes import STAGING_BYTES
from ollm_core.kv.disk.storage import DiskKVStore
from ollm_core.memory.accounts import MemoryAccount

logger = logging.getLogger("ollm")


@dataclass(frozen=True, slots=True, eq=False)
class _Pin:
    """A kept prefix and the sequence that holds its blocks."""

    sequence: int
    prefix: Prefix
    token_ids: Tensor
    """int32 [T]."""


class PrefixCachingStore(DiskKVStore):
    """A DiskKVStore whose sequences are kept when it is closed (see KeepsPrefixes).

    Full blocks are kept as soon as they are there, so that a process that is killed has kept them.
    A kept block is never written again: a sequence that goes on inside it has a copy of its own.
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
        self._parent = directory
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
        self._move_to_longer(wanted)
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
        if self._keeps and num_full > self._num_kept.get(sequence, 0):
            self._guarded(sequence, num_full)

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
                if num_tokens > self._num_kept.get(sequence, 0):
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
        if any(_common(pin.token_ids, token_ids) == num_tokens for pin in self._pins):
            return
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
            if _common(pin.token_ids, token_ids) == len(pin.token_ids):
                self._drop(pin)
        self._pins.append(_Pin(pinned, prefix, token_ids))

    def _drop(self, pin: _Pin) -> None:
        """Forget a prefix, first on disk: only then its blocks may be used again. Raises OSError
        with the prefix still held.
        """
        self._pins.remove(pin)
        self._disk.home.drop(pin.prefix)
        self.release(pin.sequence)

    def _drop_damaged(self) -> None:
        """Forget the prefixes with a block that was found damaged."""
        damaged = self._disk.damaged
        for pin in [*self._pins] if damaged else ():
            layers = enumerate(self._blocks_of(pin.sequence))
            if any((i, block) in damaged for i, (_, blocks) in layers for block in blocks):
                logger.warning(
                    "a cached prefix of %d tokens is damaged, and not used", len(pin.token_ids)
                )
                with suppress(OSError):
                    self._drop(pin)

    def _matches(self, token_ids: Tensor) -> list[tuple[_Pin, int]]:
        """The prefixes, and how many of these tokens each has; the one with most first."""
        found = [(pin, _common(pin.token_ids, token_ids)) for pin in self._pins]
        return sorted(found, key=lambda one: one[1], reverse=True)

    def _move_to_longer(self, token_ids: Tensor) -> None:
        """Go on in another directory that has more of these tokens, as long as nothing is stored
        here and no other process has that one.
        """
        pinned = {pin.sequence for pin in self._pins}
        if any(self._blocks_of(sequence)[0][1] for sequence in self._tables.keys() - pinned):
            return
        found = []
        for path in find_homes(self._parent):
            with suppress(OSError, KVStoreError):
                kept = read_journal(path)[1] if path != self._disk.home.directory else []
                longest = max((_common(_tensor(one), token_ids) for one in kept), default=0)
                found.append((longest, path))
        here = max((number for _, number in self._matches(token_ids)), default=0)
        for num_tokens, path in sorted(found, reverse=True):
            if num_tokens <= here:
                return
            home = open_home(path, self.geometry, self._fingerprint)
            if home:
                self._leave(pinned)
                self._disk.move(home)
                self._pin_all(home)
                return

    def _pin_all(self, home: KVDirectory) -> None:
        """Hold the blocks of all that is kept in `home`."""
        kept = [
            (len(one.token_ids), [(layer.first, list(layer.blocks)) for layer in one.layers])
            for one in home.prefixes
        ]
        self._pins = [
            _Pin(sequence, one, _tensor(one))
            for sequence, one in zip(self._adopt(kept), home.prefixes, strict=True)
        ]
        for one in home.prefixes:
            for layer_idx, layer in enumerate(one.layers):
                for block, number in zip(layer.blocks, layer.checksums, strict=True):
                    self._disk.checksums[layer_idx, block] = number

    def _write_tails(self, sequence: int) -> None:
        for layer_idx, table in enumerate(self._tables[sequence]):
            if table.tail is not None:
                num_tokens = table.num_tokens % self.block_size
                block = table.blocks[table.num_tokens // self.block_size]
                self._disk.write_part(layer_idx, block, table.tail, num_tokens)


def _tensor(prefix: Prefix) -> Tensor:
    return torch.frombuffer(prefix.token_ids, dtype=torch.int32)


def _common(one: Tensor, other: Tensor) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(one), len(other))
    different = (one[:shorter] != other[:shorter]).nonzero()
    return int(different[0]) if len(different) else shorter
