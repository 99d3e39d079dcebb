"""Checks token ids and lengths against the model's vocabulary and positions."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ollm_core.errors import InputError
from ollm_core.generate.padding import PaddedBatch


def check_tokens(batch: PaddedBatch, config: PreTrainedConfig) -> None:
    """Raise InputError for tokens that are none, and for too many."""
    lowest, highest = int(batch.ids.min()), int(batch.ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"token id {wrong} is not in the vocabulary of {config.vocab_size}",
            hint="the tokenizer is not this model's",
        )
    counts = batch.kept.sum(dim=1).tolist()
    check_length(max(map(sum, zip(batch.starts, counts, strict=True))), config)


def check_length(length: int, config: PreTrainedConfig) -> None:
    """Raise InputError for more tokens than the model has positions."""
    limit = getattr(config, "max_position_embeddings", None)  # Mamba has none
    if isinstance(limit, int) and length > limit:
        raise InputError(
            f"{length} tokens are past the model's {limit} positions",
            hint="shorten the prompt or ask for fewer new tokens",
        )
