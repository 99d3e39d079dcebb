"""Comparisons of how many tokens a cache holds, row by row and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ollm_core import KVStore
from ollm_core.testing import SequenceCache


def same_lengths(
    store: KVStore, sequences: Sequence[int], expected: Sequence[int], num_layers: int, what: str
) -> None:
    """Raises AssertionError unless every layer has just so many tokens of each sequence."""
    for row, (sequence, length) in enumerate(zip(sequences, expected, strict=True)):
        for layer_idx in range(num_layers):
            found = store.num_tokens(sequence, layer_idx)
            if found != length:
                raise AssertionError(
                    f"row {row}, layer {layer_idx}, {what}: expected {length} tokens, got {found}"
                )


def same_columns(cache: SequenceCache, mask: Tensor, num_columns: int, what: str) -> None:
    """Raises AssertionError unless a cache has just the first `num_columns` of a left-padded batch
    that begins with `mask` [B, S]: so many positions, and of each row what is no padding.
    """
    found = cache.get_seq_length()
    if found != num_columns:
        raise AssertionError(f"{what}: expected {num_columns} positions, got {found}")
    expected = [max(num_columns - padding, 0) for padding in (mask == 0).sum(dim=1).tolist()]
    same_lengths(cache.store, cache.rows, expected, len(cache), what)
