"""The contracts of draft sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


class Drafter(Protocol):
    """A draft source: guesses the next tokens, which the model then checks in one weight pass.

    A wrong guess costs time and never changes the text. One that holds resources may be `Closing`:
    it is then closed with the model.
    """

    def __call__(self, token_ids: Tensor, num_tokens: int) -> Tensor | Sequence[int]:
        """`token_ids` [S], all so far, on the CPU -> at most `num_tokens` ids [n] that may come
        next; none is allowed. The text may be another one than before, or empty.
        """


@runtime_checkable
class FollowsText(Protocol):
    """What a Drafter may be able to do beside, if it holds memory that grows with the text, and
    must read the text before it can draft.
    """

    def begin(self, num_tokens: int) -> None:
        """Before the first pass of a text that will have at most `num_tokens`; 0: none to draft
        for, as for a batch. Reserves what drafts for it take. Raises DoesNotFitError.
        """

    def catch_up(self, token_ids: Tensor) -> None:
        """Read what of `token_ids` [S], all so far, was not read yet, if that takes longer than a
        draft: what it takes is then not held against the draft.
        """
