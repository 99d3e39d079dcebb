"""The KV store of a model that has both layers with keys and values and layers with recurrent
states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ollm_core.contracts.kv import KVGeometry, KVStore, SharedRun, TierBytes
from ollm_core.errors import KVStoreError
from ollm_core.kv.recurrent.states import StateStore


class HybridKVStore(KVStore):
    """Any KV store for the layers that have keys and values, and a StateStore for the others (see
    KeepsStates). Owns both.
    """

    def __init__(self, geometry: KVGeometry, attention: KVStore, states: StateStore) -> None:
        """`geometry` is of all layers; `attention` is a store of those that are not recurrent."""
        self.block_size = attention.block_size
        self._attention = attention
        self._states = states
        places = (i for i, kind in enumerate(geometry.kinds) if kind.has_keys)
        self._places = {layer_idx: place for place, layer_idx in enumerate(places)}

    def new_sequence(self) -> int:
        sequence = self._attention.new_sequence()
        self._states.add(sequence)
        return sequence

    def growth_bytes(self, sequence: int, num_tokens: int, longest: int | None = None) -> TierBytes:
        blocks = self._attention.growth_bytes(sequence, num_tokens, longest)
        return _sum(blocks, self._states.growth_bytes(sequence, num_tokens))

    def reserve(self, sequence: int, num_tokens: int, longest: int | None = None) -> None:
        self._attention.reserve(sequence, num_tokens, longest)
        try:
            self._states.reserve(sequence, num_tokens)
        except BaseException:
            self._attention.truncate(sequence, self._attention.num_tokens(sequence))
            raise

    def commit(self, sequence: int) -> None:
        self._attention.commit(sequence)

    def append(self, layer_idx: int, sequence: int, keys: Tensor, values: Tensor) -> None:
        self._attention.append(self._place(layer_idx), sequence, keys, values)

    def blocks(
        self, layer_idx: int, sequence: int, num_tokens: int | None = None, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self._attention.blocks(self._place(layer_idx), sequence, num_tokens, first)

    def shared_runs(
        self, layer_idx: int, sequences: Sequence[int], ends: Sequence[int]
    ) -> Sequence[SharedRun]:
        """See KVStore. A recurrent state is of one sequence alone."""
        if layer_idx not in self._places:
            return ()
        return self._attention.shared_runs(self._places[layer_idx], sequences, ends)

    @property
    def in_place(self) -> bool:
        return self._attention.in_place

    def expect(self, sequence: int, num_drafted: int) -> None:
        """See KeepsStates."""
        self._states.expect(sequence, num_drafted)

    def state(self, layer_idx: int, sequence: int) -> Sequence[Tensor] | None:
        """See KeepsStates."""
        return self._states.state(layer_idx, sequence)

    def put_state(
        self, layer_idx: int, sequence: int, num_new: int, state: Sequence[Tensor]
    ) -> None:
        """See KeepsStates."""
        self._states.put_state(layer_idx, sequence, num_new, state)

    def num_tokens(self, sequence: int, layer_idx: int | None = None) -> int:
        if layer_idx is None:
            stored = self._attention.num_tokens(sequence)
            return min(stored, self._states.num_tokens(sequence))
        found = self.num_tokens(sequence)  # of a layer that keeps nothing
        if layer_idx in self._states.shapes:
            found = self._states.num_tokens(sequence, layer_idx)
        if layer_idx in self._places:
            stored = self._attention.num_tokens(sequence, self._places[layer_idx])
            # Of both, what is not as long as the rest shows where they differ.
            if layer_idx not in self._states.shapes or stored > found:
                return stored
        return found

    def truncate(self, sequence: int, num_tokens: int) -> None:
        """See KVStore. A recurrent layer goes back to where the last pass began, to before each of
        its drafted tokens, or to nothing.
        """
        self._check(sequence, num_tokens, "truncate to")
        self._attention.truncate(sequence, num_tokens)
        self._states.truncate(sequence, num_tokens)

    def can_truncate(self, sequence: int, num_tokens: int) -> bool:
        return (
            0 <= num_tokens <= self.num_tokens(sequence)
            and self._states.restorable(sequence, num_tokens)
            and self._attention.can_truncate(sequence, num_tokens)
        )

    def fork(self, sequence: int, num_tokens: int | None = None) -> int:
        """See KVStore and `truncate`."""
        wanted = self.num_tokens(sequence) if num_tokens is None else num_tokens
        self._check(sequence, wanted, "fork at")
        forked = self._attention.fork(sequence, wanted)
        try:
            self._states.add(forked)
            self._states.fork(sequence, forked, wanted)
        except BaseException:
            self.release(forked)
            raise
        return forked

    def release(self, sequence: int) -> None:
        self._attention.release(sequence)
        self._states.release(sequence)

    def tier_bytes(self) -> TierBytes:
        return _sum(self._attention.tier_bytes(), self._states.tier_bytes())

    @property
    def bytes_read(self) -> int:
        return self._attention.bytes_read

    def close(self) -> None:
        self._attention.close()
        self._states.close()

    def _place(self, layer_idx: int) -> int:
        """The layer's number among those that have keys and values."""
        if layer_idx not in self._places:
            raise KVStoreError(f"layer {layer_idx} has no keys and values")
        return self._places[layer_idx]

    def _check(self, sequence: int, num_tokens: int, what: str) -> None:
        found = self.num_tokens(sequence)
        if not 0 <= num_tokens <= found:
            raise KVStoreError(
                f"sequence {sequence} has {found} tokens; cannot {what} {num_tokens}",
                hint=f"num_tokens must be between 0 and {found}",
            )
        if not self._states.restorable(sequence, num_tokens):
            raise KVStoreError(
                f"sequence {sequence} has recurrent states, and none after {num_tokens} tokens; "
                f"cannot {what} {num_tokens}",
                hint="go back to where the last pass began, or start a new sequence",
            )


def _sum(one: TierBytes, other: TierBytes) -> TierBytes:
    return TierBytes(one.device + other.device, one.host + other.host, one.disk + other.disk)
