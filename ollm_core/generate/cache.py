"""The cache that `generate` passes around: one sequence of a KV store for each row of a batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ollm_core.contracts.kv import CacheKind, KeepsPrefixes, KVStore
from ollm_core.engine.batch import NewTokens
from ollm_core.errors import InputError, UnsupportedError


class SequenceCache(Cache):
    """A transformers Cache over a KV store. Padding is never stored: a row only remembers where it
    was.

    Owns the store: closes it when it is closed itself or no longer referred to.
    """

    def __init__(
        self,
        store: KVStore,
        kinds: Sequence[CacheKind],
        demand: Callable[[str], None] | None = None,
    ) -> None:
        """`kinds` are those of the layers. `demand` raises UnsupportedError for a capability that
        the model does not have.
        """
        super().__init__(layers=[])
        self.store = store
        self._prefixes = store if isinstance(store, KeepsPrefixes) else None
        self._demand = demand
        self.rows: list[int] = []
        """Sequence of each batch row."""
        self.kept: list[Tensor] = []
        """Per row, bool [S]: which positions of the padded batch are real tokens."""
        self.drafting = False
        """Whether passes may bring drafts."""
        self._kinds = tuple(kinds)
        self.finalizer = weakref.finalize(self, store.close)

    def close(self) -> None:
        """Free what the cache holds. May be called twice."""
        self.finalizer()

    def begin(self, num_rows: int) -> None:
        """Make sure that there are `num_rows` rows, each with just the tokens that were noted, in
        every layer: what an interrupted pass has left beyond them is dropped. Raises InputError if
        there are others already.
        """
        if not self.rows:
            self.rows.extend(self.store.new_sequence() for _ in range(num_rows))
            self.kept = [torch.zeros(0, dtype=torch.bool, device="cpu")] * num_rows
        if len(self.rows) != num_rows:
            raise InputError(f"the cache has {len(self.rows)} rows, the batch has {num_rows}")
        for sequence, kept in zip(self.rows, self.kept, strict=True):
            noted, layers = int(kept.count_nonzero()), range(len(self._kinds))
            if any(self.store.num_tokens(sequence, layer_idx) != noted for layer_idx in layers):
                self.store.truncate(sequence, noted)

    def restore(self, prompts: Sequence[Tensor]) -> None:
        """Let each row, which is empty, begin with what the store has kept of its prompt [T]."""
        if self._prefixes is not None:
            for row, prompt in enumerate(prompts):
                sequence, _ = self._prefixes.find(prompt)
                self.store.release(self.rows[row])
                self.rows[row] = sequence

    def clear(self) -> None:
        """Make the rows empty again. Positions must not have been noted."""
        for row, sequence in enumerate(self.rows):
            self.store.release(sequence)
            self.rows[row] = self.store.new_sequence()

    def extend(self, kept: Tensor, token_ids: Sequence[Tensor]) -> None:
        """Note positions, bool [B, T], that were added to the rows, and each row's real tokens
        among them, [n].
        """
        before, self.kept = self.kept, [torch.cat(p) for p in zip(self.kept, kept, strict=True)]
        if self._prefixes is not None:
            for sequence, row, ids in zip(self.rows, before, token_ids, strict=True):
                self._prefixes.keep(sequence, int(row.sum()), ids)

    def num_tokens(self, row: int) -> int:
        """Real tokens of a row."""
        return self.store.num_tokens(self.rows[row])

    def drafted(self, num_drafted: int) -> NewTokens:
        """What the only row would bring to a pass that checks `num_drafted` tokens, which are not
        known yet.
        """
        ids = torch.zeros(num_drafted + 1, dtype=torch.long, device="cpu")
        return NewTokens(self.rows[0], ids, self.num_tokens(0), len(ids), num_drafted)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return bool(self.rows)

    @property
    def is_sliding(self) -> list[bool]:
        return [kind.kind == "sliding" for kind in self._kinds]

    def __len__(self) -> int:
        return len(self._kinds)

    def __repr__(self) -> str:
        return f"SequenceCache(rows={len(self.rows)}, tokens={self.get_seq_length()})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions of the padded batch so far."""
        return len(self.kept[0]) if self.kept else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise UnsupportedError("this cache belongs to a streamed model and works with no other")

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` positions, all if there are fewer; a positive number is
        the length to keep.

        Raises UnsupportedError for a family that cannot go back, KVStoreError, with nothing
        changed, if one of the rows cannot go back so far.
        """
        if self._demand:
            self._demand("truncate")
        length = self.get_seq_length()
        wanted = tokens_to_remove if tokens_to_remove > 0 else max(length + tokens_to_remove, 0)
        kept = [row[:wanted] for row in self.kept]
        cuts = [(one, int(left.sum())) for one, left in zip(self.rows, kept, strict=True)]
        # What the store refuses comes first, before any other row is cut.
        for sequence, num_tokens in sorted(cuts, key=lambda cut: self.store.can_truncate(*cut)):
            self.store.truncate(sequence, num_tokens)
        self.kept = kept  # only now: a store that refuses leaves the notes as they were

    def reset(self) -> None:
        """Forget all rows."""
        for sequence in self.rows:
            self.store.release(sequence)
        self.rows.clear()
        self.kept = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a fork of what was row `beam_idx[i]`."""
        self._pick(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick([row for row in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        picked = torch.arange(len(self.rows), device="cpu")[indices.cpu()]
        self._pick(picked.tolist())

    def activate_past_recording(self) -> None:
        """Assisted decoding begins: tokens after the first one whose logits are wanted are guesses,
        and may be cut.
        """
        self.drafting = True

    def _pick(self, sources: list[int]) -> None:
        """Make the rows forks of those. Raises DoesNotFitError with nothing changed."""
        forks: list[int] = []
        try:
            for source in sources:
                forks.append(self.store.fork(self.rows[source]))  # noqa: PERF401 - undone one by one
        except BaseException:
            for fork in forks:
                self.store.release(fork)
            raise
        for sequence in self.rows:
            self.store.release(sequence)
        self.rows = forks
        self.kept = [self.kept[source] for source in sources]
