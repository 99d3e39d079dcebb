"""The built-in draft source: it looks up what followed the same words earlier in the text."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


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
