"""Finds a tokenizer's control tokens, and encodes text that spells one as plain text.

A control token is what a chat template marks turns with: each special token, and each other added
token that the template spells (`<tool_call>`), as transformers' own `sanitize_control_tokens` has
it. Further added tokens are words that the model knows as one, and stay what they are.

The rule is about ids, not about spellings: what a text makes of the prompt has no control token
that a harmless word in its place would not have. So it holds whatever a tokenizer's normaliser does
to a text, and whatever a template does to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from ollm_core.errors import InputError
from ollm_core.files.untrusted_json import show

_PRIVATE_USE = [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]
_ALLOWED = "--allow-special-tokens reads them as the control tokens that they spell"


class ControlTokens:
    """Those of one tokenizer under one chat template."""

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        """`template` is the source of the chat template."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        chosen = {
            token.content: number
            for number, token in added.items()
            if token.content.strip() and (token.special or token.content in template)
        }
        chosen |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.spellings: Sequence[str] = sorted(chosen, key=len, reverse=True)
        self.ids = frozenset(chosen.values()) - _only_unknown(tokenizer)

    def spelled(self, *texts: str) -> list[str]:
        """Those that any of `texts` spells, longest first."""
        return [one for one in self.spellings if any(one in text for text in texts)]

    def among(self, token_ids: Sequence[int]) -> list[int]:
        """The control tokens in `token_ids`, in order."""
        return [number for number in token_ids if number in self.ids]

    def check(self, token_ids: Sequence[int], harmless: Sequence[int]) -> None:
        """Raises InputError if `token_ids` has other control tokens than `harmless`, which is
        encoded from a harmless text in the same place.
        """
        have, want = self.among(token_ids), self.among(harmless)
        if have == want:
            return
        names = {str(self._tokenizer.convert_ids_to_tokens(number)) for number in have}
        names -= {str(self._tokenizer.convert_ids_to_tokens(number)) for number in want}
        raise InputError(
            "the prompt cannot be told from control tokens: "
            f"need {len(want)} of the chat template, have {len(have)}"
            + (f", with {', '.join(map(show, sorted(names)))}" if names else ""),
            hint=_ALLOWED,
        )


class Marks:
    """Two characters that no text of a prompt has, put around each control token that one spells.

    They go through a chat template with the text, and show afterwards what in its output is the
    text's and what its own.
    """

    def __init__(
        self, tokenizer: Any, control: ControlTokens, spelled: Sequence[str], texts: Sequence[str]
    ) -> None:
        """`spelled` are to be marked. Raises InputError if no two characters are in none of
        `texts`, which are all that the marks may meet.
        """
        self._tokenizer = tokenizer
        self._control = control
        self._spelled = "|".join(map(re.escape, spelled))
        taken = set().union(*texts)
        free = (char for char in map(chr, _PRIVATE_USE) if char not in taken)
        self._start, self._end = next(free, ""), next(free, "")
        if not self._end:
            raise InputError("the prompt has every private-use character of Unicode")

    def mark(self, text: str) -> str:
        """`text` with each spelling between marks."""
        return re.sub(self._spelled, rf"{self._start}\g<0>{self._end}", text)

    def encode(self, marked: str) -> list[int]:
        """The ids of `marked` without its marks: plain characters between them, anything else as
        the tokenizer has it. A mark that a template has torn from its pair still cuts the text, so
        that nothing grows together around it.
        """
        pair = f"{self._start}({self._spelled}){self._end}|[{self._start}{self._end}]"
        pieces = re.split(pair, marked)  # text, spelling or None, text, ...
        token_ids = self._tokens(pieces[0])
        for number, piece in enumerate(pieces[1:], start=1):
            if piece:
                encode = self._plain if number % 2 else self._tokens
                token_ids += self._inside(piece, encode)
        return token_ids

    def _inside(self, piece: str, encode: Callable[[str], list[int]]) -> list[int]:
        """The ids of a piece that is not the first: SentencePiece puts a space before a first."""
        newline = self._tokens("\n")
        token_ids = encode("\n" + piece)
        if token_ids[: len(newline)] == newline:
            return token_ids[len(newline) :]
        return encode(piece)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain(self, text: str) -> list[int]:
        """The ids of a text whose added tokens are plain characters. A vocabulary may have one of
        them as a piece: then letter by letter.
        """
        token_ids = self._by_model(text, list)
        if self._control.among(token_ids):
            token_ids = self._by_model(text, "".join)
        return token_ids

    def _by_model(self, text: str, parts: Callable[[Iterable[str]], Iterable[str]]) -> list[int]:
        """The ids of `text` by the tokenizer without its added tokens."""
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return [
                number
                for part in parts([text])
                for number in tokenizer.encode(
                    part, add_special_tokens=False, split_special_tokens=True
                )
            ]
        backend = tokenizer.backend_tokenizer  # its own switch leaves tokens that are not special
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for part in parts(words) for token in backend.model.tokenize(part)]


def _only_unknown(tokenizer: Any) -> frozenset[int]:
    """The token of text that a tokenizer does not know: plain text may well become it, unless it
    has another meaning too.
    """
    unknown = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return frozenset() if unknown is None or unknown in others else frozenset([unknown])
