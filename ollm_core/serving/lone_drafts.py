"""Drafts for a text that runs alone: one pass then checks several tokens. Where many texts share a
pass, they are its tokens.
"""

from __future__ import annotations

import torch

from ollm_core.contracts.kv import KVStore
from ollm_core.drafting.controller import draft_length
from ollm_core.drafting.text_drafts import NUM_DRAFT_TOKENS, TextDrafts, begin_text
from ollm_core.engine.batch import NewTokens
from ollm_core.serving.model import ServedModel
from ollm_core.serving.texts import GeneratedText


class LoneDrafts:
    """The drafts of whichever text runs alone, by the model's draft source."""

    def __init__(self, model: ServedModel, store: KVStore) -> None:
        self._model = model
        self._store = store
        self._text: GeneratedText | None = None
        self._drafts: TextDrafts | None = None

    def follow(self, text: GeneratedText | None) -> None:
        """`text` runs alone in the next pass; None: several do, or none. Raises DoesNotFitError
        where a draft source has no room beside it.
        """
        model, drafter = self._model, self._model.drafter
        if drafter is None or text is self._text:
            return
        self._text, self._drafts = None, None
        begin_text(drafter, 0 if text is None else text.longest)
        self._text = text
        if text is not None:
            self._drafts = TextDrafts(
                drafter,
                draft_length(NUM_DRAFT_TOKENS, model.num_draft_tokens, sampling=text.samples),
                model.engine.counters,
                self._fits,
                vocab_size=model.vocab_size,
            )

    def guess(self) -> None:
        """Give the text that is followed a draft for its next pass. Raises PluginError."""
        text = self._text
        if text is not None and self._drafts is not None and not text.reads:
            ids = torch.tensor(text.token_ids, dtype=torch.long, device="cpu")
            # The text's last token needs no place in the store.
            text.guess(self._drafts.next(ids, text.longest - len(ids) - 1).tolist())

    def checked(self, num_checked: int, num_right: int) -> None:
        """A pass over the text that is followed is through: of `num_checked` drafted tokens the
        first `num_right` were right.
        """
        if self._drafts is not None:
            self._drafts.checked(num_checked, num_right)

    def _fits(self, num_drafted: int) -> bool:
        """Whether there is memory for a pass that checks so many."""
        assert self._text is not None
        assert self._text.sequence is not None
        ids = torch.zeros(num_drafted + 1, dtype=torch.long, device="cpu")
        work = NewTokens(self._text.sequence, ids, self._text.num_stored, len(ids), num_drafted)
        return self._model.engine.fits(self._store, [work])
