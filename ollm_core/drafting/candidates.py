"""Draft tokens for transformers' assisted decoding, which checks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.candidate_generator import CandidateGenerator

from ollm_core.drafting.text_drafts import TextDrafts


class DraftCandidates(CandidateGenerator):
    """The drafts of one call of `generate`, cut so that they change no text.

    A draft ends before the token that would end the text, because transformers looks at the
    stopping criteria only after each pass.
    """

    def __init__(
        self, drafts: TextDrafts, stopping_criteria: StoppingCriteriaList, *, max_positions: int
    ) -> None:
        self._drafts = drafts
        self._stopping_criteria = stopping_criteria
        self._max_positions = max_positions
        self._num_drafted = 0

    def get_candidates(self, input_ids: Tensor, **_: Any) -> tuple[Any, Any]:
        """`input_ids` [1, S] -> with the draft, [1, S + n], and None for its logits. Raises
        PluginError for what is no token.
        """
        draft = self._drafts.next(input_ids[0].cpu(), self._max_positions - input_ids.shape[1])
        candidates = self._before_end(input_ids, draft) if len(draft) else input_ids
        self._num_drafted = candidates.shape[1] - input_ids.shape[1]
        return candidates, None

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:
        """Called by transformers after each pass."""
        self._drafts.checked(self._num_drafted, int(num_matches))

    def _before_end(self, input_ids: Tensor, draft: Tensor) -> Tensor:
        candidates = torch.cat([input_ids, draft.to(input_ids.device)[None]], dim=1)
        for length in range(input_ids.shape[1] + 1, candidates.shape[1] + 1):
            if bool(self._stopping_criteria(candidates[:, :length], None).any()):
                return candidates[:, : length - 1]
        return candidates
