"""The prefix cache of hybrid models: keys and values in a PrefixCachingStore, recurrent states in
files of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from ollm_core.contracts.kv import KVGeometry
from ollm_core.errors import OllmError
from ollm_core.kv.disk.checkpoints import CheckpointingStore, DiskCheckpoint
from ollm_core.kv.disk.prefix_cache import PrefixCachingStore
from ollm_core.kv.disk.unfinished import as_bytes
from ollm_core.kv.recurrent.hybrid import HybridKVStore
from ollm_core.kv.recurrent.snapshots import StateFiles, StateWriter
from ollm_core.kv.recurrent.states import StateStore

SPACING = 8192
"""Tokens from one state that is kept within a long prompt to the next, about."""

logger = logging.getLogger("ollm")


class PrefixCachingLayersStore(HybridKVStore):
    """See KeepsPrefixes: of a model that has no states, but layers that remember nothing."""

    def __init__(
        self, geometry: KVGeometry, attention: PrefixCachingStore, states: StateStore
    ) -> None:
        """See HybridKVStore; `states` are of no layer."""
        super().__init__(geometry, attention, states)
        self._kept = attention

    def find(self, token_ids: Tensor) -> tuple[int, int]:
        """See KeepsPrefixes."""
        sequence, num_tokens = self._kept.find(token_ids)
        self._states.add(sequence)
        return sequence, num_tokens

    def keep(self, sequence: int, start: int, token_ids: Tensor) -> None:
        """See KeepsPrefixes."""
        self._kept.keep(sequence, start, token_ids)


class PrefixCachingHybridStore(HybridKVStore):
    """See KeepsPrefixes. A kept prefix is of use where there is a state: after each prompt, after
    the last text, and within a long prompt at some edges of chunks.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        attention: PrefixCachingStore,
        states: StateStore,
        files: StateFiles,
    ) -> None:
        """See HybridKVStore; `files` is where states are kept."""
        super().__init__(geometry, attention, states)
        self._kept = attention
        self._num_layers = geometry.num_layers
        self._files = files
        self._keeps = True
        self._ends: dict[int, int] = {}
        """Where the pass of each sequence will end."""
        self._writers: dict[tuple[int, int], StateWriter] = {}
        """By sequence and number of tokens: states of a pass that is not finished."""
        states.on_state = self._seen

    def find(self, token_ids: Tensor) -> tuple[int, int]:
        """See KeepsPrefixes."""
        sequence, longest = self._kept.find(token_ids)
        self._states.add(sequence)
        for num_tokens in self._files.find(token_ids, longest):
            states = self._files.read(token_ids[:num_tokens])
            if states is None:
                continue
            try:
                self._kept.truncate(sequence, num_tokens)
                self._states.adopt(sequence, num_tokens, states)
            except OllmError as error:
                logger.warning("a cached prefix cannot be used: %s", error)
                break
            return sequence, num_tokens
        self.release(sequence)
        return self.new_sequence(), 0

    def keep(self, sequence: int, start: int, token_ids: Tensor) -> None:
        """See KeepsPrefixes."""
        self._kept.keep_tokens(sequence, start, token_ids)
        known = self._kept.token_ids(sequence)
        for key in [key for key in self._writers if key[0] == sequence]:
            writer = self._writers.pop(key)
            with self._guarded(), self._kept.turn():
                if self._kept.keeps(sequence) and self._kept.make_room(self._files.file_bytes):
                    writer.finish(known[: writer.num_tokens])
                else:
                    writer.drop()
        if len(token_ids) > 1:
            self._keep_end(sequence)
        self._kept.drop_finished(sequence)

    def checkpoint(
        self,
        sequence: int,
        token_ids: Tensor,
        settings: Mapping[str, Any],
        dtypes: Collection[torch.dtype],
    ) -> DiskCheckpoint | None:
        """See KeepsCheckpoints."""
        if not isinstance(self._kept, CheckpointingStore) or not self._keeps:
            return None
        states = _States(self._num_layers, self._places, self._states)
        return self._kept.checkpoint_beside(sequence, token_ids, settings, dtypes, states)

    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        super().reserve(sequence, num_tokens, longest)
        self._drop_writers(sequence)
        self._ends[sequence] = num_tokens

    def truncate(self, sequence: int, num_tokens: int) -> None:
        super().truncate(sequence, num_tokens)
        self._drop_writers(sequence)

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        forked = super().fork(sequence, num_tokens)
        self._ends[forked] = self.num_tokens(forked)
        return forked

    def release(self, sequence: int) -> None:
        super().release(sequence)
        self._drop_writers(sequence)
        self._ends.pop(sequence, None)

    def close(self) -> None:
        """See KVStore. Before that, keeps the states that the sequences have now."""
        for sequence in list(self._ends):
            self._keep_end(sequence)
            self._drop_writers(sequence)
        self._ends.clear()
        super().close()

    def _seen(
        self, layer_idx: int, sequence: int, num_new: int, num_tokens: int, state: Sequence[Tensor]
    ) -> None:
        """Write the state at some edges of chunks of a long prompt: the last one before its end,
        and one every SPACING tokens.
        """
        rest = self._ends.get(sequence, 0) - num_tokens
        crossed = num_tokens // SPACING > (num_tokens - num_new) // SPACING
        if num_new > 1 and rest > 0 and (rest <= num_new or crossed) and self._keeps:
            with self._guarded():
                key = sequence, num_tokens
                if key not in self._writers:
                    self._writers[key] = StateWriter(self._files, num_tokens)
                self._writers[key].write(layer_idx, state)

    def _keep_end(self, sequence: int) -> None:
        """Write the state that a sequence has, if its tokens are known."""
        num_tokens = self.num_tokens(sequence)
        known = self._kept.token_ids(sequence)
        if not self._keeps or len(known) != num_tokens or not num_tokens:
            return
        if not self._kept.keeps(sequence):
            return
        with self._guarded(), self._kept.turn():
            if not self._files.has(known) and self._kept.make_room(self._files.file_bytes):
                writer = StateWriter(self._files, num_tokens)
                try:
                    for layer_idx in self._files.offsets:
                        state = self._states.state(layer_idx, sequence)
                        assert state is not None, "it has tokens"
                        writer.write(layer_idx, state)
                    writer.finish(known)
                finally:
                    writer.drop()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Keep without ever failing: the answer is worth more than its state."""
        try:
            yield
        except OSError as error:
            self._keeps = False
            logger.warning("recurrent states are not saved in the prefix cache: %s", error)

    def _drop_writers(self, sequence: int) -> None:
        for key in [key for key in self._writers if key[0] == sequence]:
            self._writers.pop(key).drop()


@dataclass(frozen=True, slots=True)
class _States:
    """The recurrent states of a model, as a checkpoint has them (see StatesBeside)."""

    num_layers: int
    places: Mapping[int, int]
    """Of the layers with keys and values."""
    store: StateStore

    def num_kept(self, num_done: int) -> int:
        return sum(layer_idx < num_done for layer_idx in self.places)

    def digest(self, sequence: int) -> bytes:
        hashed = xxhash.xxh3_128()
        for layer_idx in self.store.shapes:
            for value in self.store.state(layer_idx, sequence) or ():
                hashed.update(as_bytes(value))
        return hashed.digest()

    def num_bytes(self, num_done: int) -> int:
        return sum(
            math.prod(shape) * dtype.itemsize
            for layer_idx, shapes in self.store.shapes.items()
            for shape, dtype in shapes
            if layer_idx < num_done
        )

    def states(self, sequence: int, num_done: int) -> Iterator[Tensor]:
        for layer_idx in self.store.shapes:
            if layer_idx < num_done:
                yield from self.store.state(layer_idx, sequence) or ()

    def put(self, sequence: int, num_done: int, num_new: int) -> Iterator[Tensor]:
        for layer_idx, shapes in self.store.shapes.items():
            if layer_idx < num_done:
                state = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
                yield from state
                self.store.put_state(layer_idx, sequence, num_new, state)
