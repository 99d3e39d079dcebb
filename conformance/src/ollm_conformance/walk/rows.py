"""What a sequence should be: its text, in the pieces in which it came, and what transformers
remembers after each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from ollm_conformance.compare import same_bits, same_within
from ollm_conformance.subject import Reference

TOLERANCE = 1e-3
"""Of the scale of the logits, where bits are not promised: rows that share a call, drafts, texts
that were cut inside a piece. What is wrong there differs by far more.
"""


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    ids: Tensor
    """[n]."""
    after: DynamicCache
    """What transformers remembers after it. Never changed."""
    exact: bool
    """Whether the model under test has the very bits of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A text so far. Never changed: what goes on from it is another."""

    reference: Reference
    pieces: tuple[_Piece, ...] = ()

    @property
    def ids(self) -> Tensor:
        """All tokens, [T]."""
        none = torch.zeros(0, dtype=torch.long)
        return torch.cat([none, *(piece.ids for piece in self.pieces)])

    def __len__(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def exact(self) -> bool:
        """Whether the bits of what follows are promised."""
        return not self.pieces or self.pieces[-1].exact

    @property
    def last(self) -> int:
        """The number of tokens of the last piece, which any family can go back by."""
        return len(self.pieces[-1].ids) if self.pieces else 0

    def then(
        self, ids: Tensor, *, exact: bool = True, last_only: bool = False
    ) -> tuple[Row, Tensor]:
        """The row with `ids` [n] after it, and transformers' logits of them, [n, V] or [1, V].
        `exact`: whether they come alone, in a call of the model that is cut as transformers' is.
        """
        cache = copy.deepcopy(self.pieces[-1].after) if self.pieces else self.reference.new_cache()
        logits = self.reference.run(ids, cache=cache, last_only=last_only)
        piece = _Piece(ids, cache, exact and self.exact)
        return Row(self.reference, (*self.pieces, piece)), logits

    def inexact(self, num_exact: int) -> Row:
        """The same where no bits are promised after so many pieces."""
        rest = [replace(piece, exact=False) for piece in self.pieces[num_exact:]]
        return Row(self.reference, (*self.pieces[:num_exact], *rest))

    def cut(self, num_tokens: int) -> Row:
        """Its first `num_tokens`."""
        pieces: list[_Piece] = []
        length = 0
        for piece in self.pieces:
            if length == num_tokens:
                break
            if length + len(piece.ids) > num_tokens:
                begun = Row(self.reference, tuple(pieces))
                return begun.then(piece.ids[: num_tokens - length], exact=False)[0]
            pieces.append(piece)
            length += len(piece.ids)
        return Row(self.reference, tuple(pieces))


def compare(found: Tensor, expected: Tensor, what: str, *, exact: bool) -> None:
    """Raises AssertionError unless logits are the same: bit for bit if that is promised."""
    if exact:
        same_bits(found.float(), expected.float(), what)
    else:
        same_within(found.float(), expected.float(), TOLERANCE, what)


def common(one: Tensor, others: Sequence[Tensor]) -> int:
    """The most tokens that `one` [T] begins with as one of the others does."""
    most = 0
    for other in others:
        shorter = min(len(one), len(other))
        different = (one[:shorter] != other[:shorter]).nonzero()
        most = max(most, int(different[0]) if len(different) else shorter)
    return most
