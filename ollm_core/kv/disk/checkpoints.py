"""A prefix cache that also keeps passes which are broken off (see KeepsCheckpoints).

Of each layer done a sequence of the store's own holds the blocks with what the pass has added, so
that they stay when the pass is undone. What else the next run needs is in a file in the home, see
`unfinished`: it names those blocks, and holds the hidden states.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ollm_core.device.buffers import PAGE
from ollm_core.errors import DamagedKVError, KVStoreError, OllmError, ReadError
from ollm_core.kv.block_table import BlockTable
from ollm_core.kv.disk.directory import home_fields
from ollm_core.kv.disk.free_space import free_bytes
from ollm_core.kv.disk.held_pass import HeldPass, PassHoldingStore
from ollm_core.kv.disk.journal import LayerBlocks, Prefix
from ollm_core.kv.disk.unfinished import (
    DTYPES,
    Unfinished,
    as_bytes,
    fill_tensors,
    is_whole,
    write_unfinished,
)

logger = logging.getLogger("ollm")

_KEY_BYTES = 16


class StatesBeside(Protocol):
    """The layers of a model beside those that a store of keys and values knows."""

    @property
    def num_layers(self) -> int:
        """Of the model."""

    def num_kept(self, num_done: int) -> int:
        """Of the first `num_done` layers, how many have keys and values."""

    def digest(self, sequence: int) -> bytes:
        """Names the states that a sequence has."""

    def num_bytes(self, num_done: int) -> int:
        """Of the states of the first `num_done` layers."""

    def states(self, sequence: int, num_done: int) -> Iterator[Tensor]:
        """These, of a sequence; contiguous."""

    def put(self, sequence: int, num_done: int, num_new: int) -> Iterator[Tensor]:
        """Tensors to be filled with them, each before the next is asked for: they are then the
        states of `sequence` after `num_new` more tokens.
        """


@dataclass(frozen=True, slots=True)
class NoStates:
    """StatesBeside of a model whose layers all have keys and values, and nothing else."""

    num_layers: int

    def num_kept(self, num_done: int) -> int:
        return num_done

    def digest(self, sequence: int) -> bytes:
        return b""

    def num_bytes(self, num_done: int) -> int:
        return 0

    def states(self, sequence: int, num_done: int) -> Iterator[Tensor]:
        return iter(())

    def put(self, sequence: int, num_done: int, num_new: int) -> Iterator[Tensor]:
        return iter(())


class CheckpointingStore(PassHoldingStore):
    """A PrefixCachingStore in which a prompt that was broken off can be gone on with."""

    def checkpoint(
        self,
        sequence: int,
        token_ids: Tensor,
        settings: Mapping[str, Any],
        dtypes: Collection[torch.dtype],
    ) -> DiskCheckpoint | None:
        """See KeepsCheckpoints."""
        states = NoStates(self.geometry.num_layers)
        return self.checkpoint_beside(sequence, token_ids, settings, dtypes, states)

    def checkpoint_beside(
        self,
        sequence: int,
        token_ids: Tensor,
        settings: Mapping[str, Any],
        dtypes: Collection[torch.dtype],
        states: StatesBeside,
    ) -> DiskCheckpoint | None:
        """The same, where layers have `states` besides."""
        start, known = self.num_tokens(sequence), self.token_ids(sequence)
        if not self._keeps or len(known) != start or len(token_ids) <= self.block_size:
            return None
        begun = self._digest(sequence, start)
        if begun is None:
            return None
        whole = torch.cat([known, token_ids.to(torch.int32).cpu()])
        stated = json.dumps({**settings, "start": start}, sort_keys=True).encode()
        parts = hashlib.sha256(stated), hashlib.sha256(begun + states.digest(sequence))
        digest = b"".join(one.digest() for one in parts) + as_bytes(whole)
        key = hashlib.sha256(digest).digest()[:_KEY_BYTES]
        found = None
        for held in [one for one in self._passes if torch.equal(one.token_ids, whole)]:
            if held.one.key == key and self._can_go_on(held, dtypes, states):
                found = held
            else:
                self._drop_pass(held)
        return DiskCheckpoint(self, sequence, key, whole, start, states, found)

    # What a DiskCheckpoint asks for.

    def save_pass(
        self, checkpoint: DiskCheckpoint, num_done: int, hidden: Sequence[Tensor]
    ) -> bool:
        """Write a checkpoint; returns whether there was room. Raises OllmError or OSError, with
        what was written before as it was.
        """
        states, sequence = checkpoint.states, checkpoint.sequence
        num_bytes = states.num_bytes(num_done) + sum(one.nbytes for one in hidden)
        dtype, home = hidden[0].dtype, self._disk.home
        alike = all(one.dtype == dtype and one.is_contiguous() for one in hidden)
        if not alike or dtype not in DTYPES.values() or not self._keeps:
            return False
        if free_bytes(home.directory) < 2 * num_bytes:
            logger.info("no room on the disk to write how far the prompt is")
            return False
        if checkpoint.held is None and not self._claim(checkpoint, num_bytes, dtype):
            return False
        held = checkpoint.held
        assert held is not None, "there is a claim"
        tables = self._tables[held.sequence]
        num_kept, first = states.num_kept(num_done), checkpoint.start // self.block_size
        new = [i for i in range(num_kept) if tables[i].num_tokens != len(checkpoint.token_ids)]
        for layer_idx in new:
            source = self._tables[sequence][layer_idx]
            self.copy_end(layer_idx, source, tables[layer_idx], first)
        self._disk.flush()
        for layer_idx in new:
            self._disk.sync(layer_idx)
        layers = self._layers_of(held.sequence)[:num_kept]
        tensors = (*states.states(sequence, num_done), *hidden)
        self._write(held, layers, num_done, dtype, tensors)
        return True

    def restore_pass(self, checkpoint: DiskCheckpoint, hidden: list[Tensor]) -> None:
        """Go on with a checkpoint. Raises ReadError or DamagedKVError."""
        held, sequence, states = checkpoint.held, checkpoint.sequence, checkpoint.states
        assert held is not None, "something was found"
        one, home = held.one, self._disk.home.directory
        num_new = len(checkpoint.token_ids) - checkpoint.start
        expected = sum(value.numel() for value in hidden) * one.hidden_dtype.itemsize
        try:
            if states.num_bytes(one.num_done) + expected != one.tensor_bytes:
                raise KVStoreError(f"{home}: an unfinished prompt has other hidden states")
            with self._disk.staging() as staging:
                put = states.put(sequence, one.num_done, num_new)
                wanted = _targets(put, hidden, one.hidden_dtype)
                fill_tensors(home, one, wanted, staging)
            for layer_idx in range(states.num_kept(one.num_done)):
                source = self._tables[held.sequence][layer_idx]
                self._manager.go_on(layer_idx, source, self._tables[sequence][layer_idx])
        except (OSError, EOFError, KVStoreError, ReadError, DamagedKVError) as error:
            self._drop_pass(held)
            if isinstance(error, DamagedKVError | ReadError):
                raise
            raise ReadError(
                f"{home}: an unfinished prompt cannot be gone on with: {error}",
                hint="run it again: it begins anew",
            ) from error

    def finish_pass(self, checkpoint: DiskCheckpoint) -> None:
        """Its pass is through."""
        if checkpoint.held is not None:
            checkpoint.held.finished_by = checkpoint.sequence

    def drop_pass(self, checkpoint: DiskCheckpoint) -> None:
        """Forget it."""
        if checkpoint.held in self._passes:
            self._drop_pass(checkpoint.held)

    # Whether it can be.

    def _digest(self, sequence: int, start: int) -> bytes | None:
        """Names keys and values that layers will see of a sequence's `start` tokens; None if they
        are not all known.
        """
        self._disk.flush()
        hashed = hashlib.sha256()
        num_full, inside = divmod(start, self.block_size)
        for layer_idx, table in enumerate(self._tables[sequence]):
            begin = self.geometry.first_needed(layer_idx, start) // self.block_size
            for index in range(begin, num_full):
                known = self._disk.checksums.get((layer_idx, table.blocks.get(index, -1)))
                if known is None:
                    return None
                hashed.update(known.to_bytes(8, "little"))
            if inside and table.tail is not None:
                for part in table.tail[:, :, :inside].flatten(0, 1):
                    hashed.update(as_bytes(part))
        return hashed.digest()

    def _can_go_on(
        self, held: HeldPass, dtypes: Collection[torch.dtype], states: StatesBeside
    ) -> bool:
        """Whether all that was written is as it was, and fits the model."""
        one, num_kept = held.one, states.num_kept(held.one.num_done)
        if (
            held.finished_by is not None
            or one.num_layers != states.num_layers
            or len(one.prefix.layers) != num_kept
            or one.hidden_dtype not in dtypes
        ):
            return False
        for layer_idx, table in enumerate(self._tables[held.sequence]):
            if layer_idx >= num_kept:  # of a pass that failed before it was written
                self._manager.release(layer_idx, table)
                self._tables[held.sequence][layer_idx] = BlockTable()
        try:
            with self._disk.staging() as staging:
                if not is_whole(self._disk.home.directory, one, staging):
                    raise KVStoreError("its hidden states are not what was written")
            for layer_idx, (_, blocks) in enumerate(self._blocks_of(held.sequence)[:num_kept]):
                for _ in self._disk.read(layer_idx, blocks):
                    pass  # each is compared with its checksum
        except (OllmError, OSError, EOFError) as error:
            logger.warning("an unfinished prompt is damaged, and begins anew: %s", error)
            return False
        return True

    # Writing.

    def _claim(self, checkpoint: DiskCheckpoint, num_bytes: int, dtype: torch.dtype) -> bool:
        """Make room under the budget for all that the pass may yet write, and say so in the home;
        returns whether there is.
        """
        home, num_tokens = self._disk.home, len(checkpoint.token_ids)
        states, bs = checkpoint.states, self.block_size
        claim = 2 * (PAGE + num_bytes + states.num_bytes(states.num_layers))
        for layer_idx in range(self.geometry.num_layers):
            first = max(checkpoint.start, self.geometry.first_needed(layer_idx, num_tokens) - bs)
            num_blocks = -(-num_tokens // bs) - max(first, 0) // bs + 1
            claim += num_blocks * self._disk.slot_bytes(layer_idx)
        one = Unfinished(
            checkpoint.key,
            Prefix(array("i", checkpoint.token_ids.tolist()), ()),
            checkpoint.start,
            0,
            states.num_layers,
            dtype,
            claim,
        )
        held = HeldPass(-1, one, checkpoint.token_ids)
        if self._budget is not None:
            with self.turn():
                going = [one.key]
                room = self._budget.make_room(lambda: claim, home.directory, self._evict, going)
                if room < claim:
                    logger.info("kv_budget has no room to write how far the prompt is")
                    return False
                self._write(held, (), 0, dtype, ())
        held.sequence = self.new_sequence()
        self._passes.append(held)
        checkpoint.held = held
        return True

    def _write(
        self,
        held: HeldPass,
        layers: tuple[LayerBlocks, ...],
        num_done: int,
        dtype: torch.dtype,
        tensors: Sequence[Tensor],
    ) -> None:
        home, prefix = self._disk.home, Prefix(held.one.prefix.token_ids, layers)
        one = replace(held.one, prefix=prefix, num_done=num_done, hidden_dtype=dtype)
        fields = home_fields(self.geometry, self._fingerprint)
        with self._disk.staging() as staging:
            held.one = write_unfinished(home.directory, fields, one, tensors, staging)
        home.unfinished = [other for other in home.unfinished if other.key != one.key]
        home.unfinished.append(held.one)


@dataclass(slots=True, eq=False)
class DiskCheckpoint:
    """See Checkpoint. Made by a CheckpointingStore."""

    store: CheckpointingStore
    sequence: int
    key: bytes
    token_ids: Tensor
    """int32 [T], all."""
    start: int
    states: StatesBeside
    held: HeldPass | None
    failed: bool = False

    @property
    def num_done(self) -> int:
        return self.held.one.num_done if self.held else 0

    def restore(self, hidden: list[Tensor]) -> None:
        self.store.restore_pass(self, hidden)

    def save(self, num_done: int, hidden: Sequence[Tensor]) -> bool:
        if self.failed:
            return False
        try:
            saved = self.store.save_pass(self, num_done, hidden)
        except (OllmError, OSError) as error:
            logger.info("how far the prompt is cannot be written: %s", error)
            saved = False
        self.failed = not saved
        return saved

    def finish(self) -> None:
        self.store.finish_pass(self)

    def drop(self) -> None:
        self.store.drop_pass(self)


def _targets(
    states: Iterator[Tensor], hidden: list[Tensor], dtype: torch.dtype
) -> Iterator[Tensor]:
    """What is to be filled: states, then hidden states, in place of those that are there."""
    yield from states
    for place, value in enumerate(hidden):
        if value.dtype != dtype or value.is_inference() or not value.is_contiguous():
            # An inference tensor may be part of what layers are called with.
            shape, device = value.shape, value.device
            hidden[place] = torch.empty(0)
            del value
            hidden[place] = torch.empty(shape, dtype=dtype, device=device)
        yield hidden[place]
