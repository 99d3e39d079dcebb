"""A prompt asked for once more, in a directory with KV of an earlier run that may be damaged."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ollm_core import OllmError
from ollm_core.testing import StreamedModel


def ask_again(model: StreamedModel, prompt: Tensor, directory: Path) -> tuple[Tensor, int]:
    """Logits [1, V] after a prompt [T], of a cache in that directory, and how many of its tokens
    were found there.
    """
    before = model.stats.cached_tokens
    cache = model.new_cache(kv_dir=directory)
    try:
        logits = model(input_ids=prompt[None], past_key_values=cache, logits_to_keep=1).logits[0]
    finally:
        cache.close()
    return logits, model.stats.cached_tokens - before


def not_misled(model: StreamedModel, prompt: Tensor, directory: Path, what: str) -> Tensor | None:
    """Logits [1, V] of a run on a damaged directory, or None if it was refused in one line. Raises
    AssertionError for any other error.
    """
    try:
        return ask_again(model, prompt, directory)[0]
    except OllmError as error:
        if "\n" in str(error):
            raise AssertionError(f"{what}: expected one line, got {str(error)!r}") from error
        return None
    except Exception as error:
        raise AssertionError(
            f"{what}: expected the logits of an undamaged run or an OllmError, "
            f"got {type(error).__name__}: {error}"
        ) from error
