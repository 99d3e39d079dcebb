"""Turns token ids into text as they come: a character appears once it is whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


class Detokenizer:
    """The text of one answer, without its special tokens."""

    def __init__(self, tokenizer: Any, shown: Collection[int] = ()) -> None:
        """`shown` are special tokens that the text has all the same."""
        self._tokenizer = tokenizer
        special: set[int] = set()
        if shown:
            added = tokenizer.added_tokens_decoder.items()
            special = {*tokenizer.all_special_ids, *(one for one, each in added if each.special)}
        self._hidden = frozenset(special.difference(shown))
        self._shows = bool(shown)
        self._token_ids: list[int] = []
        self._given = 0  # tokens whose text is out
        self._context = 0  # where decoding starts: a token's text depends on the one before

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is whole with `token_ids`, after what was given before."""
        self._token_ids += token_ids
        return self._next(last=False)

    def finish(self) -> str:
        """What is left, whole or not."""
        return self._next(last=True)

    def _next(self, *, last: bool) -> str:
        before = self._decode(self._token_ids[self._context : self._given])
        text = self._decode(self._token_ids[self._context :])
        if text.endswith("\ufffd") and not last:  # in the middle of a character
            return ""
        self._context, self._given = self._given, len(self._token_ids)
        return text[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        if self._shows:
            token_ids = [one for one in token_ids if one not in self._hidden]
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=not self._shows))


def begun_at_end(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if mark.startswith(text[-n:])), 0)
