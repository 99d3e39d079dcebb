"""The drafts of one text: a draft source is asked as often, and for as many tokens, as pays. Who
checks them, transformers' assisted decoding or the scheduler, says what each pass found.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ollm_core.contracts.drafting import Drafter, FollowsText
from ollm_core.contracts.progress import Stats
from ollm_core.drafting.controller import DraftLength
from ollm_core.errors import PluginError

NUM_DRAFT_TOKENS = 10
"""The most tokens drafted at a time, the number that transformers looks up too."""


class PassCounts(Protocol):
    """What passes have cost, by the engine's own clock, and where it is told of drafts."""

    @property
    def counted(self) -> Stats:
        """What was counted so far."""

    def count_drafting(self, seconds: float) -> None:
        """A draft source took time between two passes."""

    def count_accepted(self, num_tokens: int) -> None:
        """So many drafted tokens were right."""


def begin_text(drafter: object, num_tokens: int) -> None:
    """Tell a draft source that follows the text of one to come; see FollowsText."""
    if isinstance(drafter, FollowsText):
        drafter.begin(num_tokens)


class TextDrafts:
    """The guesses of a Drafter for one text. The first pass, which reads the prompt, has none: it
    is then the same as without a draft source.
    """

    def __init__(
        self,
        drafter: Drafter,
        controller: DraftLength,
        counts: PassCounts,
        fits: Callable[[int], bool],
        *,
        vocab_size: int,
    ) -> None:
        """`counts` go on with each pass, and here by what drafting takes and what was right.
        `fits` says whether there is memory for a pass that checks so many.
        """
        self._drafter = drafter
        self._controller = controller
        self._counts = counts
        self._fits = fits
        self._vocab_size = vocab_size
        self._before_prompt = counts.counted.prefill_seconds
        self._seconds: float | None = None
        """Of decoding, before the pass; None before the one that reads the prompt."""

    def next(self, token_ids: Tensor, limit: int) -> Tensor:
        """As much of a draft after `token_ids` [S], on the CPU, as is worth to be checked, at most
        `limit` tokens. To be called before each pass. Raises PluginError for what is no token.
        """
        if self._seconds is None:
            return token_ids[:0]
        start = time.perf_counter()
        draft = self._draft(token_ids, limit)
        self._counts.count_drafting(time.perf_counter() - start)
        self._seconds = self._counts.counted.decode_seconds
        return draft

    def checked(self, num_checked: int, num_right: int) -> None:
        """To be called after each pass: of `num_checked` tokens the first `num_right` were
        right.
        """
        now = self._counts.counted.decode_seconds
        if self._seconds is None:
            self._controller.started(self._counts.counted.prefill_seconds - self._before_prompt)
            self._seconds = now
        else:
            self._controller.checked(num_checked, num_right, now - self._seconds)
        self._counts.count_accepted(num_right)

    def _draft(self, token_ids: Tensor, limit: int) -> Tensor:
        num_asked = self._controller.ask(limit)
        if num_asked > 0 and isinstance(self._drafter, FollowsText):
            start = time.perf_counter()
            self._drafter.catch_up(token_ids)
            self._controller.caught_up(time.perf_counter() - start)
            num_asked = self._controller.ask(limit)
        start = time.perf_counter()
        while num_asked > 0 and not self._fits(num_asked):
            num_asked //= 2
        if num_asked < 1:
            return token_ids[:0]
        draft = self._checked(self._drafter(token_ids, num_asked))[:num_asked]
        seconds = time.perf_counter() - start
        return draft[: self._controller.answered(num_asked, len(draft), seconds)]

    def _checked(self, draft: object) -> Tensor:
        """A draft as token ids, [n] int64."""
        try:
            found = torch.as_tensor(draft, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise PluginError(f"the draft source gave {draft!a:.60}, expected token ids") from error
        if found.numel() == 0:
            return torch.zeros(0, dtype=torch.long, device="cpu")
        if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
            raise PluginError(
                f"the draft source gave {found.dtype} {list(found.shape)}, expected integers [n]"
            )
        lowest, highest = int(found.min()), int(found.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise PluginError(
                f"the draft source gave token id {lowest if lowest < 0 else highest}, "
                f"the vocabulary has {self._vocab_size}",
                hint="use another draft source, or none",
            )
        return found.to(torch.long)
