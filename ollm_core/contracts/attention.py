"""The contract of an attention function, and the view of keys and values that a layer gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ollm_core.contracts.kv import KVStore, SharedRun

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ATTENTIONS = ("exact", "blockwise", "flash")
"""What can be asked for. "flash" is "blockwise" with the kernels of the package flash-attn."""


@dataclass(frozen=True, slots=True)
class KVView:
    """What a layer's attention may see: the new keys and values of R rows, and the store for what
    came before.

    It stands where transformers expects the key tensor, and reaches the attention function through
    the layer.
    """

    keys: Tensor
    """[R, G, T, D], new, rotated."""
    values: Tensor
    """[R, G, T, D], new."""
    layer_idx: int
    sequences: tuple[int, ...]
    """One per row."""
    starts: tuple[int, ...]
    """Tokens of each row that come before the new ones."""
    store: KVStore
    attention: Attention
    shares: bool = True
    """Whether there is memory to read for several rows at once what they share."""
    lengths: tuple[int, ...] = ()
    """Packed: the new tokens of rows with different numbers of them, so many of each, come one
    after another, as in one row: `keys` and `values` are [1, G, T, D], with the T of all rows, and
    so is the query that comes with them. Only blockwise attention is given such a view.
    """

    def split(self, given: Tensor) -> tuple[Tensor, ...]:
        """Keys, values or a query [R, X, T, D], row by row: [X, T, D] of each."""
        return given[0].split(self.lengths, dim=1) if self.lengths else given.unbind()

    def past(
        self, row: int, window: int | None = None, begin: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Stored keys and values before the new tokens of `row`, as pairs of [G, n, D]: from
        `first(row, window)` on, and not before `begin`.
        """
        first = max(self.first(row, window), begin)
        return self.store.blocks(self.layer_idx, self.sequences[row], self.starts[row], first)

    def shared_runs(self) -> Sequence[SharedRun]:
        """What several rows have stored in the same blocks, before their new tokens."""
        if not self.shares or len(self.sequences) < 2:
            return ()
        return self.store.shared_runs(self.layer_idx, self.sequences, self.starts)

    def shared(self, run: SharedRun) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of a run, as pairs of [G, n, D]."""
        sequence = self.sequences[run.rows[0]]
        return self.store.blocks(self.layer_idx, sequence, run.end, run.first)

    def kept(self, row: int, window: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """As `past`, but with the new tokens, of a store that is `in_place`."""
        first, end = self.first(row, window), self.starts[row] + self.keys.shape[2]
        return list(self.store.blocks(self.layer_idx, self.sequences[row], end, first))

    def first(self, row: int, window: int | None = None) -> int:
        """The first position that a new token of `row` may see. `window` counts tokens, the one
        that looks included; None is without end.
        """
        return 0 if window is None else max(self.starts[row] - window + 1, 0)


class Attention(Protocol):
    """Causal attention of new tokens over all earlier ones and themselves."""

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        view: KVView,
        *,
        scaling: float,
        **options: Any,
    ) -> Tensor:
        """`query` [R, H, T, D] -> [R, T, H, D]. `module` is the transformers attention module that
        asks.

        `options` are those that the module passes to any attention function; one that is not
        understood and not None is refused with UnsupportedError rather than ignored.
        """
