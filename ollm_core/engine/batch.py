"""How the new tokens of a weight pass are cut into calls of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
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
    kept: bool = True
    """Whether they may be found again, where the store keeps prefixes."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One call of a layer: tokens `begin` to `end` of the new ones of each of `rows` (indices into
    the work).
    """

    rows: tuple[int, ...]
    begin: int
    end: int
    lengths: tuple[int, ...] = ()
    """Packed: all new tokens of `rows`, so many of each, come one after another, as one row of the
    call, from 0 to `end`. Empty: not packed.
    """

    @property
    def num_rows(self) -> int:
        """Rows of the call."""
        return 1 if self.lengths else len(self.rows)

    @property
    def num_tokens(self) -> int:
        """New tokens per row of the call."""
        return self.end - self.begin

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """Which of the new tokens of which item of the work it has: row, begin, end."""
        if self.lengths:
            return [(row, 0, end) for row, end in zip(self.rows, self.lengths, strict=True)]
        return [(row, self.begin, self.end) for row in self.rows]

    def positions(self, work: Sequence[NewTokens]) -> Tensor:
        """Where its tokens stand in their sequences, [R, T] of the call."""
        spans = [
            torch.arange(work[row].start + begin, work[row].start + end, device="cpu")
            for row, begin, end in self.spans
        ]
        return torch.cat(spans).view(self.num_rows, self.num_tokens)


def num_new_tokens(work: Sequence[NewTokens]) -> int:
    """Over all sequences."""
    return sum(len(item.token_ids) for item in work)


def stage_of(work: Sequence[NewTokens]) -> Literal["prefill", "decode"]:
    """Whether a pass reads a prompt: more than one token of a sequence, and those after the first
    no drafts, which go on from stored tokens.
    """
    reads_prompt = any(
        len(item.token_ids) > 1 and (item.start == 0 or len(item.token_ids) > 1 + item.num_drafted)
        for item in work
    )
    return "prefill" if reads_prompt else "decode"


Steps = Literal["together", "drafted", "all"]
"""Which tokens may share a call with those before them: all of them; all but drafted ones, as the
state before each is wanted; or only those of a sequence's first call.
"""


def cut_chunks(
    work: Sequence[NewTokens],
    chunk_size: int,
    *,
    aligned: bool = False,
    steps: Steps = "together",
    together: Sequence[Sequence[int]] = (),
) -> Iterator[Chunk]:
    """Cut `work` into chunks of at most `chunk_size` tokens.

    Sequences with equally many new tokens and guesses share a call while they fit in a chunk
    together, if all of them go on or all begin; a longer one goes chunk by chunk, alone. If
    `aligned`, they must come after equally many tokens. What must not share a call by `steps` goes
    one token at a time, as when decoding. Rows in one of the groups of `together` are packed where
    they have different numbers of new tokens.
    """
    packed = [chunk for rows in together for chunk in _pack(work, rows, chunk_size)]
    yield from packed
    done = {row for chunk in packed for row in chunk.rows}
    alike: dict[tuple[int, int, int], list[int]] = {}
    for row, item in enumerate(work):
        if row in done:
            continue
        start = item.start if aligned else int(item.start > 0)
        key = len(item.token_ids), item.num_drafted, start
        alike.setdefault(key, []).append(row)
    for (length, num_drafted, start), rows in alike.items():
        most = max(chunk_size // length, 1)
        sure = length if steps == "together" else length - num_drafted
        if steps == "all":
            sure = 0 if start else min(sure, chunk_size)
        begins = [*range(0, sure, chunk_size), *range(sure, length)]
        for first in range(0, len(rows), most):
            group = tuple(rows[first : first + most])
            for begin, end in itertools.pairwise((*begins, length)):
                yield Chunk(group, begin, end)


def _pack(work: Sequence[NewTokens], rows: Sequence[int], chunk_size: int) -> Iterator[Chunk]:
    """Chunks of neighbours of `rows` that fit in one together and differ in length; the others are
    left out.
    """
    bins: list[list[int]] = [[]]
    for row in rows:
        length = len(work[row].token_ids)
        if length > chunk_size or not 0 < work[row].num_logits <= length:
            continue
        if sum(len(work[one].token_ids) for one in bins[-1]) + length > chunk_size:
            bins.append([])
        bins[-1].append(row)
    for found in bins:
        lengths = tuple(len(work[row].token_ids) for row in found)
        if len(set(lengths)) > 1:
            yield Chunk(tuple(found), 0, sum(lengths), lengths)
