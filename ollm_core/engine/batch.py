"""How the new tokens of a weight pass are cut into calls of a layer."""

from __future__ import annotations

import itertools
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


Steps = Literal["together", "drafted", "all"]
"""Which tokens may share a call with those before them: all of them; all but drafted ones, as the
state before each is wanted; or only those of a sequence's first call.
"""


def cut_chunks(
    work: Sequence[NewTokens], chunk_size: int, *, aligned: bool = False, steps: Steps = "together"
) -> Iterator[Chunk]:
    """Cut `work` into chunks of at most `chunk_size` tokens.

    Sequences with equally many new tokens and guesses share a call while they fit in a chunk
    together, if all of them go on or all begin; a longer one goes chunk by chunk, alone. If
    `aligned`, they must come after equally many tokens. What must not share a call by `steps` goes
    one token at a time, as when decoding.
    """
    alike: dict[tuple[int, int, int], list[int]] = {}
    for row, item in enumerate(work):
        start = item.start if aligned else int(item.start > 0)
        key = len(item.token_ids), item.num_drafted, start
        alike.setdefault(key, []).append(row)
    for (length, num_drafted, start), rows in alike.items():
        together = max(chunk_size // length, 1)
        sure = length if steps == "together" else length - num_drafted
        if steps == "all":
            sure = 0 if start else min(sure, chunk_size)
        begins = [*range(0, sure, chunk_size), *range(sure, length)]
        for first in range(0, len(rows), together):
            group = tuple(rows[first : first + together])
            for begin, end in itertools.pairwise((*begins, length)):
                yield Chunk(group, begin, end)
