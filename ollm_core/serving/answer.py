"""The text of one answer as it grows: whole characters, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ollm_core.errors import InputError
from ollm_core.text.detokenizer import Detokenizer, begun_at_end


class Answer:
    """Turns new tokens into text, and finds what ends it. What may be the beginning of such a text
    is held back until it is not.
    """

    def __init__(
        self, tokenizer: Any, stops: Mapping[str, bool], shown: Collection[int] = ()
    ) -> None:
        """`stops` are the texts that end it, and whether each is part of it; `shown` are special
        tokens that it has, which are else left out. Without a `tokenizer` there is no text. Raises
        InputError for `stops` then.
        """
        if stops and tokenizer is None:
            raise InputError(
                "stop: need a tokenizer to find texts, have none", hint="use stop_token_ids"
            )
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, shown)
        self._stops = dict(stops)
        self._held = ""
        self.stopped_by: str | None = None
        """The text that has ended it."""

    def add(self, token_id: int) -> str:
        """The text that is certain with one more token."""
        if self._detokenizer is None or self.stopped_by is not None:
            return ""
        return self._certain(self._detokenizer.add([token_id]))

    def finish(self) -> str:
        """What is left. Nothing after a text that has ended it."""
        if self._detokenizer is None or self.stopped_by is not None:
            return ""
        rest = self._certain(self._detokenizer.finish())
        rest, self._held = rest + self._held, ""
        return rest

    def _certain(self, new: str) -> str:
        if not new or not self._stops:
            return new
        text = self._held + new
        places = [(text.find(stop), stop) for stop in self._stops]
        found = min(((at, stop) for at, stop in places if at >= 0), default=None)
        if found is not None:
            at, self.stopped_by = found
            self._held = ""
            return text[: at + len(self.stopped_by) * self._stops[self.stopped_by]]
        end = len(text) - max(begun_at_end(text, stop) for stop in self._stops)
        self._held = text[end:]
        return text[:end]
