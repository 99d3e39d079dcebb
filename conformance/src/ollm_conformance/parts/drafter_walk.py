"""Random walks over a draft source: texts that grow, are cut and change, in one tensor that is used
again, against a new source for each question.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from ollm_conformance.compare import same_tokens
from ollm_conformance.parts.drafter_suite import MOST, DrafterSuite
from ollm_conformance.parts.texts import answer, random_text
from ollm_core import FollowsText

_NUM_STEPS = 30
_NUM_TEXTS = 3
_LEAST_ROOM = 60


class DrafterWalk:
    """One walk. The plain model is a source that begins with the text it is asked about."""

    def __init__(self, suite: type[DrafterSuite], draw: random.Random) -> None:
        self._suite = suite
        self._draw = draw
        self._texts = [self._phrases() for _ in range(_NUM_TEXTS)]
        self._current = 0
        self._number = MOST
        """Asked for at last."""
        self._most = 0
        """Tokens that the source was told of; 0: it must not be asked."""
        self._room = torch.zeros(suite.longest, dtype=torch.long)
        """What texts are given in, as a view: it holds another one the next time."""
        self._done: list[str] = []
        self._what = self._told = ""

    def run(self, told: str) -> None:
        """Raises AssertionError with the last steps before the one that went wrong."""
        self._told = told
        with self._suite.opened(0) as opened:
            self._opened, self._empty = opened, opened.used
            self._begin()
            steps: list[Callable[[], None]] = [
                self._ask, self._ask, self._ask, self._grow, self._grow, self._cut, self._turn,
                self._change, self._read, self._begin, self._give_up,
            ]  # fmt: skip
            for _ in range(_NUM_STEPS):
                self._draw.choice(steps)()

    def _next(self, step: str) -> None:
        self._done.append(step)
        self._what = f"{self._told}, after {', '.join(self._done[-3:])}"

    def _phrases(self) -> list[int]:
        """A text of a few phrases that come back."""
        count = self._draw.randint(2, 12)
        phrases = [
            random_text(count, self._suite.vocab_size, self._draw.randrange(1000)).tolist()
            for _ in range(2)
        ]
        return [token for _ in range(3) for token in self._draw.choice(phrases)]

    @property
    def _text(self) -> list[int]:
        return self._texts[self._current]

    def _begin(self) -> None:
        longest = max(map(len, self._texts))
        self._most = self._draw.choice([longest, longest + _LEAST_ROOM, self._suite.longest])
        self._most = min(self._most, self._suite.longest)
        self._next(f"a text of at most {self._most}")
        self._opened.begin(self._most)

    def _give_up(self) -> None:
        self._next("no text to draft for")
        self._opened.begin(0)
        self._most = 0
        if isinstance(self._opened.drafter, FollowsText):
            assert self._opened.used == self._empty, (
                f"{self._what}: expected {self._empty} bytes reserved, as before any text, got "
                f"{self._opened.used}"
            )

    def _given(self) -> Tensor:
        """The text, in the room that all have."""
        self._room.fill_(-1)
        self._room[: len(self._text)] = torch.tensor(self._text, dtype=torch.long)
        return self._room[: len(self._text)]

    def _fits(self) -> bool:
        if len(self._text) > self._most:
            self._begin()
        return len(self._text) <= self._most

    def _read(self) -> None:
        """The source reads a text, or the beginning of one, and is asked nothing."""
        if not self._fits():
            return
        given = self._given()[: self._draw.randint(0, len(self._text))]
        self._next(f"reading {len(given)} tokens of text {self._current}")
        self._opened.catch_up(given)
        same_tokens(given.tolist(), self._text[: len(given)], f"{self._what}: the text given")

    def _ask(self, number: int | None = None) -> None:
        if not self._fits():
            return
        number = self._draw.choice([1, 2, 4, MOST, 0]) if number is None else number
        self._number = number
        self._next(f"{number} tokens for {len(self._text)} of text {self._current}")
        given = self._given()
        if self._draw.random() < 0.5:
            self._opened.catch_up(given)
        found = answer(self._opened.drafter, given, number, self._what)
        same_tokens(given.tolist(), self._text, f"{self._what}: the text given")
        assert len(found) <= number, f"{self._what}: expected at most {number}, got {len(found)}"
        foreign = [token for token in found if not 0 <= token < self._suite.vocab_size]
        assert not foreign, f"{self._what}: expected ids of the vocabulary, got {foreign[0]}"
        if not self._suite.learns:
            same_tokens(found, self._anew(number), f"{self._what}: a draft")

    def _anew(self, number: int) -> list[int]:
        """What a new source drafts."""
        with self._suite.opened(self._most) as opened:
            return opened.draft(torch.tensor(self._text, dtype=torch.long), number, "a new source")

    def _grow(self) -> None:
        """By tokens that came before, as right drafts are, or by others."""
        count = self._draw.randint(1, 6)
        begin = self._draw.randrange(max(len(self._text) - count, 1))
        more = self._text[begin : begin + count] if self._draw.random() < 0.6 else []
        more = more or [self._draw.randrange(self._suite.vocab_size) for _ in range(count)]
        if len(self._text) + len(more) > self._suite.longest:
            return
        self._next(f"{len(more)} more tokens")
        self._text.extend(more)

    def _cut(self) -> None:
        count = self._draw.randint(0, len(self._text))
        self._next(f"a text cut by {count}")
        del self._text[len(self._text) - count :]

    def _turn(self) -> None:
        self._current = self._draw.randrange(_NUM_TEXTS)
        self._next(f"turning to text {self._current}")

    def _change(self) -> None:
        """A text of the same length, asked about before and after."""
        if not self._text:
            return
        self._ask()
        place = -self._draw.randint(1, min(len(self._text), 4))
        others = [token for token in self._text if token != self._text[place]]
        self._next(f"another token {-place} before the end")
        self._text[place] = self._draw.choice(others or [0])
        self._ask(self._number)
