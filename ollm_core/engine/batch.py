"""How the new tokens of a weight pass are cut into calls of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """What one sequence brings to a weight pass: `token_ids` [T], after `start` tokens that it has.

    Logits are wanted at its last `num_logits` positions.
    """

    sequence: int
    token_ids: Tensor
    start: int
    num_logits: int = 1
    num_drafted: int = 0
    """How many of the last ones are guesses: the sequence may be cut before any of them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One call of a layer: tokens `begin` to `end` of the new ones of each of `rows` (indices into
    the work).
    """

    rows: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_tokens(self) -> int:
        """New tokens per row."""
        return self.end - self.begin


def num_new_tokens(work: Sequence[NewTokens]) -> int:
    """Over all sequences."""
    return sum(len(item.token_ids) for item in work)


def stage_of(work: Sequence[NewTokens]) -> Literal["prefill", "decode"]:
    """Whether a pass reads a prompt. A draft is not one: it goes on from stored tokens, and all of
    its logits are wanted.
    """
    reads_prompt = any(
        len(item.token_ids) > 1 and (item.start == 0 or item.num_logits < len(item.token_ids))
        for item in work
    )
    return "prefill" if reads_prompt else "decode"


def cut_chunks(
    work: Sequence[NewTokens], chunk_size: int, *, aligned: bool = False
) -> Iterator[Chunk]:
    """Cut `work` into chunks of at most `chunk_size` tokens.

    Sequences with equally many new tokens and guesses share a call while they fit in a chunk
    together, if all of them go on or all begin; a longer one goes chunk by chunk, alone. If
    `aligned`, they must come after equally many tokens.
    """
    alike: dict[tuple[int, int, int], list[int]] = {}
    for row, item in enumerate(work):
        start = item.start if aligned else int(item.start > 0)
        key = len(item.token_ids), item.num_drafted, start
        alike.setdefault(key, []).append(row)
    for (length, *_), rows in alike.items():
        together = max(chunk_size // length, 1)
        for first in range(0, len(rows), together):
            group = tuple(rows[first : first + together])
            for begin in range(0, length, chunk_size):
                yield Chunk(group, begin, min(begin + chunk_size, length))
