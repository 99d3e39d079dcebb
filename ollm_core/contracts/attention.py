"""The contract of an attention function, and the view of keys and values that a layer gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ollm_core.contracts.kv import KVStore

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

    def past(self, row: int, window: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Stored keys and values before the new tokens of `row`, as pairs of [G, n, D]: from
        `first(row, window)` on.
        """
        first = self.first(row, window)
        return self.store.blocks(self.layer_idx, self.sequences[row], self.starts[row], first)

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
