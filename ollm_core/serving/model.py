"""What serving knows of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ollm_core.contracts.drafting import Drafter
from ollm_core.engine.engine import Engine
from ollm_core.errors import InputError
from ollm_core.serving.request import Choices, Request, Score

MAX_RUNNING = 256


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """An engine, and what the checkpoint says of texts."""

    engine: Engine
    device: torch.device
    vocab_size: int
    max_positions: int | None
    generation: GenerationConfig
    """Where texts end, and what they must not say."""
    tokenizer: Any = None
    max_running: int = MAX_RUNNING
    """Texts in one pass."""
    drafter: Drafter | None = None
    """Drafts for a text that runs alone."""
    num_draft_tokens: int | None = None
    """At a time; None: as many as pay."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end a text."""
        ends = self.generation.eos_token_id
        if ends is None:
            return ()
        return (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end a text, and are part of it."""
        texts = self.generation.stop_strings
        if not texts:
            return ()
        return (texts,) if isinstance(texts, str) else tuple(texts)

    def check(self, request: Request) -> None:
        """Raises InputError for a request that the model can never answer."""
        ids, wanted = request.token_ids, request.wanted
        if not len(ids):
            raise InputError("the prompt is empty", hint="give at least one token")
        asked = wanted.token_ids if isinstance(wanted, Choices) else ()
        lowest, highest = min((*ids, *asked)), max((*ids, *asked))
        if lowest < 0 or highest >= self.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InputError(
                f"token id {wrong} is not in the vocabulary of {self.vocab_size}",
                hint="the tokenizer is not this model's",
            )
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise InputError(
                f"{len(ids)} tokens are past the model's {self.max_positions} positions",
                hint="shorten the prompt",
            )
        if isinstance(wanted, Score) and not 0 < wanted.num_tokens < len(ids):
            raise InputError(
                f"score: need 1 to {len(ids) - 1} of {len(ids)} tokens, have {wanted.num_tokens}",
                hint="the first token has no probability: nothing comes before it",
            )
