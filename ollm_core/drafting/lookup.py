"""Draft tokens for transformers' assisted decoding, and the built-in source that looks them up
earlier in the text.

The checking is transformers' assisted decoding; this module hands it the guesses. How many, the
draft-length controller decides.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)

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


class LookupDrafter:
    """Guesses what followed the last tokens earlier in the text, as transformers' prompt lookup."""

    def __call__(self, token_ids: Tensor, num_tokens: int) -> Tensor:
        """See Drafter."""
        if num_tokens < 1:
            return token_ids[:0]
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=num_tokens, max_length=sys.maxsize
        )
        text: Any = token_ids[None]
        found: Tensor = generator.get_candidates(text)[0]
        return found[0, len(token_ids) :]


class DraftCandidates(CandidateGenerator):
    """The guesses of a Drafter for one call of `generate`, cut so that they change no text.

    A draft ends before the token that would end the text, because transformers looks at the
    stopping criteria only after each pass. The first pass, which reads the prompt, has no draft:
    it is then the same as without a draft source.
    """

    def __init__(
        self,
        drafter: Drafter,
        controller: DraftLength,
        counts: PassCounts,
        stopping_criteria: StoppingCriteriaList,
        fits: Callable[[int], bool],
        *,
        max_positions: int,
        vocab_size: int,
    ) -> None:
        """`counts` go on with each pass, and here by what drafting takes and what was right.
        `fits` says whether there is memory for a pass that checks so many.
        """
        self._drafter = drafter
        self._controller = controller
        self._counts = counts
        self._stopping_criteria = stopping_criteria
        self._fits = fits
        self._max_positions = max_positions
        self._vocab_size = vocab_size
        self._before_prompt = counts.counted.prefill_seconds
        self._seconds: float | None = None
        """Of decoding, before the pass; None before the one that reads the prompt."""
        self._num_drafted = 0

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Any, Any]:
        """`input_ids` [1, S] -> with the draft, [1, S + n], and None for its logits. Raises
        PluginError for what is no token.
        """
        candidates = input_ids
        if self._seconds is not None:
            start = time.perf_counter()
            candidates = self._drafted(input_ids)
            self._counts.count_drafting(time.perf_counter() - start)
            self._seconds = self._counts.counted.decode_seconds
        self._num_drafted = candidates.shape[1] - input_ids.shape[1]
        return candidates, None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Called by transformers after each pass."""
        now, num_right = self._counts.counted.decode_seconds, int(num_matches)
        if self._seconds is None:
            self._controller.started(self._counts.counted.prefill_seconds - self._before_prompt)
            self._seconds = now
        else:
            self._controller.checked(self._num_drafted, num_right, now - self._seconds)
        self._counts.count_accepted(num_right)

    def _drafted(self, input_ids: Tensor) -> Tensor:
        """`input_ids` [1, S] with as much of a draft as is worth to be checked."""
        limit = self._max_positions - input_ids.shape[1]
        num_asked = self._controller.ask(limit)
        if num_asked > 0 and isinstance(self._drafter, FollowsText):
            start = time.perf_counter()
            self._drafter.catch_up(input_ids[0].cpu())
            self._controller.caught_up(time.perf_counter() - start)
            num_asked = self._controller.ask(limit)
        start = time.perf_counter()
        while num_asked > 0 and not self._fits(num_asked):
            num_asked //= 2
        if num_asked < 1:
            return input_ids
        draft = self._checked(self._drafter(input_ids[0].cpu(), num_asked))[:num_asked]
        seconds = time.perf_counter() - start
        draft = draft[: self._controller.answered(num_asked, len(draft), seconds)]
        candidates = torch.cat([input_ids, draft.to(input_ids.device)[None]], dim=1)
        for length in range(input_ids.shape[1] + 1, candidates.shape[1] + 1):
            if bool(self._stopping_criteria(candidates[:, :length], None).any()):
                return candidates[:, : length - 1]
        return candidates

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
